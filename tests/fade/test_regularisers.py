"""GIFT's pull and EKPC's penalty: the formulas against a few lines in float64, and what they do to a training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import fade
import fade.unlearning
from fade.config import Config
from fade.digitcanvas import load_pipeline
from fade.distillation import Trained
from fade.errors import FadeError
from fade.noise import epoch_order, step_generator
from fade.regularisers import FisherPull, ImportancePenalty, normalised_fisher

from .conftest import same_bits, tiny_pipeline
from .methods.test_all import baseline, probe, small

WORDS = {"forget": "cat", "surrogate": "dog", "templates": ("{}", "a {}"), "progress": False}
WORDS["retain"] = ("red", "a bird")


def tensors(adapter: fade.Adapter) -> dict[str, torch.Tensor]:
    return {str(i): parameter.detach().clone() for i, parameter in enumerate(adapter.parameters())}


def moved(adapter: fade.Adapter) -> float:
    """How far values, which begin at 0, or B have come from their start."""
    return sum(float(layer.adapter_parameters("fade")[-1].square().sum()) for layer in adapter.layers.values())


def test_the_pull_is_the_gradient_of_gifts_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))]
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    pull = FisherPull(parameters, 0.3)
    retain = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    retain[1].zero_()  # no gradient, no information
    total = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient.clone()

    def learn(forget: float, kept: float) -> tuple[float, float]:
        assert (forget, kept) == (0.0, 1.0) and torch.is_grad_enabled()
        for parameter, gradient in zip(parameters, retain, strict=True):
            parameter.grad = gradient.clone()
        return 0.0, 0.0

    pull.add_(learn)
    for parameter, before, kept, own in zip(parameters, start, retain, total, strict=True):
        phi = parameter.detach().clone().requires_grad_(True)
        fisher = kept**2 / (kept**2).mean() if kept.any() else torch.zeros_like(kept)
        (expected,) = torch.autograd.grad(0.3 * (fisher * (phi - before) ** 2).sum(), phi)
        torch.testing.assert_close(parameter.grad, own + expected)
    torch.testing.assert_close(normalised_fisher(retain[0]).mean(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("parameters", ["factors", "values"])
def test_the_penalty_is_that_of_the_weights_importance(
    pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch, parameters: str
) -> None:
    """At an adapter moved at random, against a gradient of autograd for every batch of the retain latents."""
    seen = []

    def instead(backbone, adapter, latents, prompts, config, seed, *rest) -> Trained:
        training = SimpleNamespace(
            backbone=backbone, adapter=adapter, latents=latents, prompts=prompts, config=config, seed=seed
        )
        penalty = ImportancePenalty(training, config.ekpc)
        assert float(penalty()) == 0.0
        generator = torch.Generator().manual_seed(1)
        before = {name: layer.get_delta_weight("fade") for name, layer in adapter.layers.items()}
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        after = {name: layer.get_delta_weight("fade") for name, layer in adapter.layers.items()}
        for parameter in adapter.parameters():
            parameter.requires_grad_(True)
        value = penalty()
        assert all(gradient.any() for gradient in torch.autograd.grad(value, adapter.parameters()))

        weights = {name: layer.get_base_layer().weight for name, layer in adapter.layers.items()}
        sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
        batches = -(-len(latents.retain) // config.retain_batch_size)
        with adapter.disabled():
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in range(batches):
                size = config.retain_batch_size
                index = epoch_order(seed, "importance retain", len(latents.retain), batch, size)
                drawing = step_generator(seed, "importance retain", batch)
                clean = latents.retain[index]
                noise = torch.randn(clean.shape, generator=drawing)
                times = backbone.draw_times(size, drawing)
                read = prompts.conditioning.rows(prompts.rows([latents.retain_prompts[i] for i in index]))
                with torch.enable_grad():
                    loss = F.mse_loss(backbone.predict(backbone.add_noise(clean, noise, times), times, read), noise)
                    gradients = torch.autograd.grad(loss, list(weights.values()))
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total += gradient.double() ** 2 / batches
        masks = {name: layer.lora_mask["fade"].mask.unpack() for name, layer in adapter.layers.items()}
        mean = torch.cat([total[masks[name]] for name, total in sums.items()]).mean()
        expected = sum(
            (total / mean * (after[name] - before[name]).double() ** 2)[masks[name]].sum()
            for name, total in sums.items()
        )
        torch.testing.assert_close(value.double(), config.ekpc * expected, rtol=1e-3, atol=0)
        seen.append(value.item())
        raise InterruptedError

    monkeypatch.setattr(fade.unlearning, "run_overwrite", instead)
    config = quick.replace(overwrite__ekpc=0.4, overwrite__parameters=parameters, data__retain_samples=5)
    with pytest.raises(InterruptedError):
        fade.unlearn(pipeline, **WORDS, config=config)
    assert len(seen) == 1 and seen[0] > 0


@pytest.mark.parametrize(("kind", "parameters"), [("gift", "factors"), ("gift", "values"), ("ekpc", "factors")])
def test_the_adapter_is_held_near_its_start(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, kind: str, parameters: str
) -> None:
    quick = quick.replace(overwrite__parameters=parameters)
    free = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick)
    config = quick.replace(**{f"overwrite__{kind}": 100.0})
    held = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path)
    assert 0 < moved(held) < 0.8 * moved(free)
    assert held.metadata["config"]["overwrite"][kind] == 100.0
    loaded = fade.load_adapter(tiny_pipeline(tokenizer), tmp_path)
    assert loaded.metadata["config"]["overwrite"][kind] == 100.0
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", ["gift", "ekpc"])
def test_a_resumed_run_is_held_by_the_same_start(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = quick.replace(**{f"overwrite__{kind}": 1.0}, overwrite__parameters="values")
    whole = tensors(fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config))
    step, done = torch.optim.AdamW.step, []

    def stopping(self: torch.optim.AdamW, *args: object) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(step(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path)
    resumed = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path, resume=True)
    assert same_bits(tensors(resumed), whole)


@pytest.mark.parametrize(("kind", "weight"), [("gift", 0.001), ("ekpc", 0.3)])
def test_on_a_trained_model_the_concept_goes_and_the_adapter_is_held(kind: str, weight: float, tmp_path: Path) -> None:
    config = small("distillation").replace(overwrite__steps=4)
    words, free, fresh = ("three", "eight"), load_pipeline(), load_pipeline()
    loose = fade.unlearn(free, *words, config=config, progress=False)
    config = config.replace(**{f"overwrite__{kind}": weight})
    held = fade.unlearn(load_pipeline(), *words, config=config, output=tmp_path, progress=False)
    assert 0 < moved(held) < moved(loose)
    loaded = fade.load_adapter(fresh, tmp_path / "adapter.safetensors")
    base, without, regularised = (probe().gone("distillation", one) for one in (load_pipeline(), free, fresh))
    assert without < regularised < base
    found = fade.evaluate(fresh, loaded, seeds=[1], steps=1, baseline=baseline(), progress=False)
    assert found.metrics["drift"] > 0
    assert loaded.metadata["config"]["overwrite"][kind] == weight


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(FadeError, match="choose one"):
        Config().replace(overwrite__gift=1.0, overwrite__ekpc=1.0)
    for name in ("gift", "ekpc"):
        with pytest.raises(FadeError, match=f"{name} must be finite and not negative"):
            Config().replace(**{f"overwrite__{name}": -1.0})
        with pytest.raises(FadeError, match="would be ignored: the method closed-form trains nothing"):
            Config().replace(**{f"overwrite__{name}": 1.0, "overwrite__method": "closed-form"})
