"""Stage 1 against plain autograd: what is accumulated, what is held in memory, what the settings mean."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from fade.backbones import Backbone, backbone_for
from fade.base_model import target_layers
from fade.concept import concept_from_words
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import Config
from fade.latents import Latents, prepare_latents
from fade.noise import epoch_order, step_generator
from fade.saliency import locate, measure_saliency

from .adapters import ATTENTION, CONVOLUTIONS

CONCEPT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car"])


@pytest.fixture(params=["pipeline", "velocity_pipeline"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    pipeline: StableDiffusionPipeline = request.getfixturevalue(request.param)
    pipeline.unet.requires_grad_(False)
    return backbone_for(pipeline)


def prepared(backbone: Backbone, quick: Config) -> tuple[Latents, EncodedPrompts]:
    latents = prepare_latents(backbone, CONCEPT, quick.data, 0, "base")
    prompts = sorted({*latents.forget_prompts, *latents.surrogate_prompts, *latents.retain_prompts})
    return latents, EncodedPrompts(prompts, backbone.encode_prompts(prompts))


def by_autograd(
    backbone: Backbone,
    names: list[str],
    latents: Latents,
    encoded: EncodedPrompts,
    quick: Config,
    kind: str,
    per_sample: bool,
) -> dict[str, torch.Tensor]:
    """Σ_b |∂ℓ_b/∂W| from `.grad`, in the same order of batches, noise and timesteps."""
    locate = quick.locate
    weights = {name: backbone.denoiser.get_submodule(name).weight for name in names}

    def total(part: str, clean: torch.Tensor, prompts: tuple, teacher: tuple | None) -> dict[str, torch.Tensor]:
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in range(locate.passes * -(-len(latents.forget) // locate.batch_size)):
            index = epoch_order(0, part, len(clean), batch, locate.batch_size)
            generator = step_generator(0, part, batch)
            z = clean[index]
            noise = torch.randn(z.shape, generator=generator)
            t = torch.randint(backbone.time_span, (len(z),), generator=generator)
            noised = backbone.add_noise(z, noise, t)
            text = Conditioning.cat([encoded[prompts[i]] for i in index])
            if teacher is None:
                target = backbone.target(z, noise, t)
            else:
                target = backbone.predict(noised, t, Conditioning.cat([encoded[teacher[i]] for i in index])).detach()
            prediction = backbone.predict(noised, t, text)
            losses = [F.mse_loss(prediction, target)]
            if per_sample:
                losses = [F.mse_loss(p, q) / len(z) for p, q in zip(prediction, target, strict=True)]
            for loss in losses:
                grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
                for name, grad in zip(weights, grads, strict=True):
                    sums[name] += grad.abs()
        for weight in weights.values():
            weight.requires_grad_(False)
        return sums

    teacher = latents.surrogate_prompts if kind == "distillation" else None
    sums = total("locate forget", latents.forget, latents.forget_prompts, teacher)
    if kind == "contrast":
        retain = total("locate retain", latents.retain, latents.retain_prompts, None)
        sums = {name: sums[name] / (retain[name] + retain[name].mean()) for name in sums}
    return sums


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["denoising", "distillation", "contrast"])
def test_saliency_is_the_summed_gradient_magnitude(
    backbone: Backbone, quick: Config, kind: str, per_sample: bool
) -> None:
    config = quick.replace(locate__saliency=kind, locate__per_sample=per_sample)
    latents, encoded = prepared(backbone, quick)
    layers = target_layers(backbone.denoiser, (*ATTENTION, *CONVOLUTIONS, "linear_1"))
    found = measure_saliency(backbone, layers, latents, encoded, config.locate, 0)
    wanted = by_autograd(backbone, list(layers), latents, encoded, config, kind, per_sample)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].abs().sum() > 0
        torch.testing.assert_close(found[name].view_as(wanted[name]), wanted[name], rtol=2e-3, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in backbone.denoiser.parameters())


def test_module_scaling_divides_each_layer_by_its_mean(backbone: Backbone, quick: Config) -> None:
    latents, encoded = prepared(backbone, quick)
    layers = target_layers(backbone.denoiser, ATTENTION)
    raw = measure_saliency(backbone, layers, latents, encoded, quick.locate, 0)
    scaled = torch.cat([(value / value.mean()).flatten() for value in raw.values()])
    located = locate(backbone, layers, latents, encoded, quick.replace(locate__scaling="module").locate, 0)
    assert located.selected == int(0.05 * scaled.numel())
    assert located.threshold == pytest.approx(scaled.topk(located.selected).values.min().item(), rel=1e-5)
    for (name, mask), record in zip(located.masks.items(), located.layers, strict=True):
        chosen = (raw[name] / raw[name].mean() >= located.threshold).flatten(1)
        assert (mask.unpack() == chosen).float().mean() > 0.999
        assert (record["name"], record["selected"]) == (name, mask.count)


@pytest.mark.parametrize("granularity", ["tile", "channel", "module", "none"])
def test_granularities(backbone: Backbone, quick: Config, granularity: str) -> None:
    latents, encoded = prepared(backbone, quick)
    layers = target_layers(backbone.denoiser, ATTENTION)
    config = quick.replace(locate__granularity=granularity, locate__keep=0.2, locate__tile=8).locate
    located = locate(backbone, layers, latents, encoded, config, 0)
    masks = {name: mask.unpack() for name, mask in located.masks.items()}
    if granularity == "none":
        assert all(mask.all() for mask in masks.values())
    elif granularity == "module":
        assert {mask.float().mean().item() for mask in masks.values()} == {0.0, 1.0}
        assert sum(bool(mask.any()) for mask in masks.values()) == int(0.2 * len(masks))
    elif granularity == "tile":
        for mask in masks.values():
            tiles = mask.view(mask.shape[0] // 8, 8, mask.shape[1] // 8, 8).float().mean((1, 3))
            assert set(tiles.flatten().tolist()) <= {0.0, 1.0}
    else:
        for mask in masks.values():
            rows, columns = mask.all(1), mask.all(0)
            assert torch.equal(mask, rows[:, None] | columns[None, :])


def test_random_saliency_is_a_control(backbone: Backbone, quick: Config) -> None:
    latents, encoded = prepared(backbone, quick)
    layers = target_layers(backbone.denoiser, ATTENTION)
    config = quick.replace(locate__saliency="random", locate__scaling="none").locate
    first, same, other = (locate(backbone, layers, latents, encoded, config, seed).masks for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_no_more_than_one_weight_gradient_is_ever_alive(backbone: Backbone, quick: Config) -> None:
    """Counts tensors of a convolution's weight's shape that appear in the backward pass and are still alive."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    layers = target_layers(backbone.denoiser, ("conv1", "conv2"))
    shapes = {tuple(module.weight.shape) for module in layers.values()}
    alive: weakref.WeakSet = weakref.WeakSet()
    most, seen = 0, 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most, seen
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and "backward" in func.name() and tuple(tensor.shape) in shapes:
                    alive.add(tensor)
                    seen += 1
                    most = max(most, len(alive))
            return result

    latents, encoded = prepared(backbone, quick)
    with Count():
        measure_saliency(backbone, layers, latents, encoded, quick.locate, 0)
    assert seen >= 2 * len(layers)
    assert most == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_saliency_of_a_16_bit_model(pipeline: StableDiffusionPipeline, quick: Config, dtype: torch.dtype) -> None:
    pipeline.unet.requires_grad_(False)
    backbone = backbone_for(pipeline)
    latents, encoded = prepared(backbone, quick)
    layers = target_layers(backbone.denoiser, ATTENTION)
    exact = measure_saliency(backbone, layers, latents, encoded, quick.locate, seed=0)
    pipeline.unet.to(dtype)
    rounded_latents = dataclasses.replace(latents, forget=latents.forget.to(dtype), retain=latents.retain.to(dtype))
    rounded_prompts = EncodedPrompts(encoded.prompts, encoded.conditioning.to("cpu", dtype))
    rounded = measure_saliency(backbone, layers, rounded_latents, rounded_prompts, quick.locate, seed=0)
    error = sum((rounded[n] - exact[n]).square().sum() for n in exact) / sum(v.square().sum() for v in exact.values())
    assert error.sqrt() < (0.02 if dtype == torch.float16 else 0.15)
