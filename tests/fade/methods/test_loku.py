"""LoKU: it begins as no change, trains half of its factors, and comes off."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import fade
import fade.unlearning
from fade.adapter import Adapter
from fade.base_model import target_layers
from fade.config import Config
from fade.distillation import overwrite
from fade.errors import FadeError
from fade.regions import matrix_shape

from ..backbones.pipelines import build
from ..conftest import denoise, same_bits, tiny_pipeline, weights

WORDS = {"forget": "cat", "surrogate": "dog", "templates": ("{}", "a {}"), "progress": False}
WORDS["retain"] = ("red", "a bird")
RANK = 3


def settings(quick: Config, **changes: object) -> Config:
    """The method's, small."""
    return Config.of("loku").replace(
        data=quick.data, overwrite__steps=8, overwrite__batch_size=3, overwrite__retain_batch_size=2,
        overwrite__rank=RANK, overwrite__alpha=2.0 * RANK, overwrite__stop_forget=0.0, **changes,
    )  # fmt: skip


def halves(adapter: Adapter) -> list[tuple[torch.Tensor, ...]]:
    """A and A₀, B and −B₀ of every layer."""
    found = []
    for layer in adapter.layers.values():
        lora_a, lora_b = (p.detach().clone().flatten(1) for p in layer.adapter_parameters("fade"))
        assert lora_a.shape[0] == lora_b.shape[1] == 2 * RANK
        found.append((lora_a[:RANK], lora_a[RANK:], lora_b[:, :RANK], lora_b[:, RANK:]))
    return found


@pytest.mark.parametrize("targets", [None, ("to_k", "conv1")])
def test_it_begins_as_no_change_and_trains_one_half(
    pipeline: StableDiffusionPipeline,
    tokenizer: CLIPTokenizer,
    quick: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...] | None,
) -> None:
    base, before = weights(pipeline), denoise(pipeline)
    begun: list[tuple[torch.Tensor, ...]] = []

    def looking(backbone: object, adapter: Adapter, *rest: object) -> object:
        begun.extend(halves(adapter))
        torch.testing.assert_close(denoise(pipeline), before, atol=1e-4, rtol=0)
        return overwrite(backbone, adapter, *rest)

    monkeypatch.setattr(fade.unlearning, "run_overwrite", looking)
    adapter = fade.unlearn(pipeline, **WORDS, config=settings(quick, locate__targets=targets), output=tmp_path)
    for first, last in zip(begun, halves(adapter), strict=True):
        assert torch.equal(first[0], first[1]) and torch.equal(first[2], -first[3])
        assert first[0].any() and first[2].any()
        assert torch.equal(first[1], last[1]) and torch.equal(first[3], last[3])
        assert not torch.equal(first[0], last[0]) and not torch.equal(first[2], last[2])
    assert same_bits(weights(pipeline), base)
    for name, layer in adapter.layers.items():
        after = halves(adapter)[list(adapter.layers).index(name)]
        residual = layer.get_base_layer().weight.flatten(1) + 2 * after[3] @ after[1]  # s −B₀ A₀
        whole = layer.get_base_layer().weight.flatten(1) + layer.get_delta_weight("fade").flatten(1)
        torch.testing.assert_close(whole, residual + 2 * after[2] @ after[0], atol=1e-5, rtol=1e-4)

    with_it = denoise(pipeline)
    assert torch.isfinite(with_it).all() and not torch.allclose(with_it, before, atol=1e-4)
    adapter.remove()
    assert torch.equal(denoise(pipeline), before)
    other = tiny_pipeline(tokenizer)
    fade.load_adapter(other, tmp_path)
    torch.testing.assert_close(denoise(other), with_it, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(quick, overwrite__checkpoint_every=2)
    whole = halves(fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config))
    step, done = torch.optim.AdamW.step, []

    def stopping(self: torch.optim.AdamW, *args: object) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(step(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path)
    resumed = halves(fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path, resume=True))
    for one, two in zip(whole, resumed, strict=True):
        assert all(map(torch.equal, one, two))


def test_regions_alone_change(quick: Config) -> None:
    """Of a weight that holds several matrices, rows and columns outside the region stay."""
    pipeline = build("Stable Diffusion XL")
    (name, *_), config = target_layers(pipeline.unet, ("attn2.to_k",)), settings(quick)
    rows, columns = matrix_shape(pipeline.unet.get_submodule(name))
    pattern = f"{name}[{rows // 2}:, :{columns // 2}]"
    adapter = fade.unlearn(pipeline, **WORDS, config=config.replace(locate__targets=(pattern,)))
    delta = adapter.layers[name].get_delta_weight("fade")
    assert delta[rows // 2 :, : columns // 2].all() and delta.count_nonzero() == (rows - rows // 2) * (columns // 2)


def test_what_cannot_be_is_told(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    for changes, words in (
        ({"overwrite__parameters": "values"}, "leave parameters at factors"),
        ({"overwrite__weight_decay": 0.1}, "leave it at 0"),
    ):
        with pytest.raises(FadeError, match=words):
            fade.unlearn(pipeline, **WORDS, config=Config.of("loku").replace(data=quick.data, **changes))
    config = settings(quick).replace(overwrite__rank=17, overwrite__alpha=16.0)
    with pytest.raises(FadeError, match="takes no rank 17: lower rank to 16"):
        fade.unlearn(pipeline, **WORDS, config=config)
    assert not fade.adapters(pipeline)
