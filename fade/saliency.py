"""Stage 1, locate: the saliency of every target weight, and the mask of those that may change.

Saliency is the gradient magnitude of a loss, summed over passes over the forget latents (FADE, arXiv 2602.07058,
section 3): S = Σ_b |∂ℓ_b/∂W|, at random noise and timesteps. The losses, with ε_θ the frozen model:

- `denoising` (the paper's)   ℓ = ‖ε_θ(z_t, c_forget) − target‖²
- `distillation`              ℓ = ‖ε_θ(z_t, c_forget) − ε_θ(z_t, c_surrogate)‖², what must change for this surrogate
- `contrast`                  denoising on the forget set, divided by (the same on the retain set + its layer mean):
                              what is special to the concept
- `random`                    uniform noise, the control

No weight gradient is ever kept: each is folded into its accumulator as it appears (`fade_kernels.GradientMagnitude`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fade.backbones import Backbone
from fade.config import LocateConfig
from fade.errors import FadeError
from fade.latents import Latents
from fade.noise import epoch_order, loss_scale, step_generator
from fade.progress import progress_bar
from fade_kernels import BitMask, GradientMagnitude, select_top_fraction


@dataclass(frozen=True)
class Located:
    """Masks by layer, and what is worth telling about them: a record per layer, the threshold and the counts."""

    masks: dict[str, BitMask]
    layers: list[dict[str, Any]]
    threshold: float
    selected: int
    total: int


def locate(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents,
    embeddings: Mapping[str, Tensor],
    config: LocateConfig,
    seed: int,
    progress: bool = False,
) -> Located:
    """Saliency of `layers` (name to base layer) on the latents, and the top `config.keep` of it as masks.

    `embeddings` maps every prompt of `latents` to [tokens, width]. The weights are frozen meanwhile; the denoiser's
    adapters must be off. Raises FadeError where `keep` selects nothing.
    """
    if config.granularity == "none":
        masks = {name: BitMask.full((m.weight.shape[0], m.weight[0].numel())) for name, m in layers.items()}
        return _located(masks, {}, 0.0)
    saliency = measure_saliency(backbone, layers, latents, embeddings, config, seed, progress)
    spread = {name: (value.mean().item(), value.max().item()) for name, value in saliency.items()}
    if config.scaling == "module":
        for name, value in saliency.items():
            value.div_(max(spread[name][0], torch.finfo(value.dtype).tiny))
    try:
        selection = select_top_fraction(list(saliency.values()), config.keep, config.granularity, config.tile)
    except ValueError as error:
        raise FadeError(str(error)) from error
    return _located(dict(zip(saliency, selection.masks, strict=True)), spread, selection.threshold)


def measure_saliency(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents,
    embeddings: Mapping[str, Tensor],
    config: LocateConfig,
    seed: int,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Unscaled saliency by layer, float32, each of its weight's shape."""
    if config.saliency == "random":
        generator = step_generator(seed, "random saliency", 0)
        return {name: torch.rand(m.weight.shape, generator=generator).to(m.weight.device) for name, m in layers.items()}
    stack = _stacker(embeddings)
    batches = config.passes * -(-len(latents.forget) // config.batch_size)
    contrast = config.saliency == "contrast"
    with progress_bar("locating", batches * (2 if contrast else 1), progress) as advance:

        def accumulate(part: str, clean: Tensor, prompts: Tensor, surrogates: Tensor | None) -> dict[str, Tensor]:
            scale = loss_scale(backbone.dtype, min(config.batch_size, len(clean)) * clean[0].numel())
            with GradientMagnitude(layers, per_sample=config.per_sample) as magnitude:
                for batch in range(batches):
                    index = epoch_order(seed, part, len(clean), batch, config.batch_size)
                    generator = step_generator(seed, part, batch)
                    _backward(backbone, clean[index], prompts[index], surrogates, index, generator, scale)
                    advance()
            for value in magnitude.saliency.values():
                value.div_(scale)
            return magnitude.saliency

        forget, surrogates = stack(latents.forget_prompts), stack(latents.surrogate_prompts)
        teacher = surrogates if config.saliency == "distillation" else None
        saliency = accumulate("locate forget", latents.forget, forget, teacher)
        if contrast:
            common = accumulate("locate retain", latents.retain, stack(latents.retain_prompts), None)
            for name, value in saliency.items():
                value.div_(common[name] + common[name].mean().clamp_min(torch.finfo(value.dtype).tiny))
    return saliency


def _backward(
    backbone: Backbone,
    clean: Tensor,
    prompts: Tensor,
    surrogates: Tensor | None,
    index: Tensor,
    generator: torch.Generator,
    scale: float,
) -> None:
    """One backward pass of the denoising loss, or, with `surrogates`, of the distillation loss, times `scale`."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    timesteps = torch.randint(backbone.num_timesteps, (len(clean),), generator=generator).to(clean.device)
    noised = backbone.add_noise(clean, noise, timesteps)
    if surrogates is None:
        target = backbone.target(clean, noise, timesteps)
    else:
        with torch.no_grad():
            target = backbone.predict(noised, timesteps, surrogates[index])
    loss = F.mse_loss(backbone.predict(noised, timesteps, prompts).float(), target.float())
    (scale * loss).backward()


def _stacker(embeddings: Mapping[str, Tensor]):
    return lambda prompts: torch.stack([embeddings[prompt] for prompt in prompts])


def _located(masks: dict[str, BitMask], spread: dict[str, tuple[float, float]], threshold: float) -> Located:
    """`spread` is the mean and the largest saliency of each layer, before scaling; empty where none was measured."""
    records = []
    for name, mask in masks.items():
        mean, largest = spread.get(name, (None, None))
        records.append(
            {
                "name": name,
                "shape": list(mask.shape),
                "saliency_mean": None if mean is None else float(f"{mean:.5g}"),
                "saliency_max": None if largest is None else float(f"{largest:.5g}"),
                "selected": mask.count,
                "density": float(f"{mask.density:.5g}"),
                "tiles_occupied": float(f"{mask.occupancy(32).float().mean().item():.5g}"),
            }
        )
    return Located(
        masks=masks,
        layers=records,
        threshold=float(threshold),
        selected=sum(mask.count for mask in masks.values()),
        total=sum(mask.shape[0] * mask.shape[1] for mask in masks.values()),
    )
