"""SSD: importances against gradients that autograd keeps, and what the edit does to a pipeline."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import fade
from fade.adapter_file import read_adapter_file
from fade.backbones import backbone_for
from fade.base_model import target_layers
from fade.config import Config
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.latents import prepare_latents
from fade.methods.ssd import dampening_factors
from fade.noise import epoch_order, step_generator
from fade.request import requested_concepts

from ..conftest import same_bits, tiny_pipeline, weights
from .changes import changes

WORDS = {"forget": "cat", "surrogate": "dog", "templates": ("{}", "a {}"), "progress": False}
WORDS["retain"] = ("red", "a bird", "blue")


def small(**changes: object) -> Config:
    return Config.of("ssd").replace(
        **{
            "data__forget_samples": 5,
            "data__retain_samples": 6,
            "data__sampling_steps": 2,
            "locate__batch_size": 4,
            "locate__passes": 1,
            "locate__per_sample": False,
        },
        **changes,
    )


def test_the_change_is_the_papers_on_gradients_of_autograd(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    """Every number of the adapter, from one squared gradient a batch."""
    base = weights(pipeline)
    config = small(options={"alpha": 1.5, "dampening": 0.5}, locate__targets=("to_k", "to_out.0"))
    adapter = fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path)
    assert same_bits(weights(pipeline), base)

    other = tiny_pipeline(tokenizer)
    backbone = backbone_for(other)
    (concept,) = requested_concepts(other, "cat", "dog", None, WORDS["templates"], WORDS["retain"], config)
    latents = prepare_latents(backbone, concept, config.data, config.seed, "", None, False)
    layers = target_layers(other.unet, ("to_k", "to_out.0"))
    importance = {}
    for part in ("forget", "retain"):
        clean, prompts = getattr(latents, part), getattr(latents, f"{part}_prompts")
        sums = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}
        for batch in range(2):  # of 4, from 5 and from 6
            index = epoch_order(0, f"importance {part}", len(clean), batch, 4)
            generator = step_generator(0, f"importance {part}", batch)
            noise = torch.randn(clean[index].shape, generator=generator)
            times = backbone.draw_times(4, generator)
            read = backbone.encode_prompts([prompts[i] for i in index])
            loss = F.mse_loss(backbone.predict(backbone.add_noise(clean[index], noise, times), times, read), noise)
            gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.double().square() / 2
        importance[part] = sums
    chosen = 0
    for name, layer in layers.items():
        of_concept, of_rest = importance["forget"][name], importance["retain"][name]
        factor = torch.where(of_concept > 1.5 * of_rest, (0.5 * of_rest / of_concept).clamp_max(1), 1.0)
        delta = adapter.layers[name].get_delta_weight("fade") if name in adapter.layers else torch.zeros_like(factor)
        torch.testing.assert_close(delta.double(), ((factor - 1) * layer.weight).detach(), atol=1e-5, rtol=1e-3)
        chosen += int((factor < 1).sum())
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    assert 0 < chosen == file.selected < sum(layer.weight.numel() for layer in layers.values())


def test_the_concept_changes_more_and_the_file_does_the_same(tmp_path: Path) -> None:
    pipeline = DIGITCANVAS.load_pipeline()
    config = Config.of("ssd", options={"alpha": 1.0}).replace(
        data__forget_samples=8, data__retain_samples=16, data__sampling_steps=4, locate__passes=2, locate__batch_size=8,
        locate__targets=("attn2.to_k", "attn2.to_v"),
    )  # fmt: skip
    adapter = fade.unlearn(pipeline, "three", "eight", method="ssd", config=config, output=tmp_path, progress=False)
    assert adapter.run["method"] == "ssd" and adapter.run["losses"] == {"forget": [], "retain": []}
    metadata = read_adapter_file(tmp_path / "adapter.safetensors").metadata
    assert Config.from_dict(metadata["config"]).options["alpha"] == 1.0
    before = changes(adapter)
    assert before[0] > 1.3 * before[1] > 0
    adapter.remove()
    assert changes(fade.load_adapter(pipeline, tmp_path)) == before


def test_what_cannot_be_is_told(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(FadeError, match="alpha of ssd must be a positive"):
        Config.of("ssd", options={"alpha": 0.0})
    with pytest.raises(FadeError, match="lower its option alpha"):
        fade.unlearn(pipeline, **WORDS, config=small(options={"alpha": 1e30}))
    assert not fade.adapters(pipeline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_no_importance_stay(dtype: torch.dtype) -> None:
    nothing = torch.zeros(3, dtype=dtype)
    assert torch.equal(dampening_factors(nothing, nothing, 10.0), torch.ones(3, dtype=dtype))
    assert torch.equal(dampening_factors(nothing + 1, nothing, 10.0), nothing)
