"""Stage 1, locate: the saliency of every target weight, and the mask of those that may change.

Saliency is the gradient magnitude of a loss, summed over passes over the forget latents (FADE, arXiv 2602.07058,
section 3): S = Σ_b |∂ℓ_b/∂W|, at random noise and timesteps. The losses, with ε_θ the frozen model:

- `denoising` (the paper's)   ℓ = ‖ε_θ(z_t, c_forget) − target‖²
- `distillation`              ℓ = ‖ε_θ(z_t, c_forget) − ε_θ(z_t, c_surrogate)‖², what must change for this surrogate
- `contrast`                  denoising on the forget set, divided by (the same on the retain set + its layer mean):
                              what is special to the concept
- `random`                    uniform noise, the control

or, with no gradient at all, the entries of the solved edit that cost most to drop (`closed-form`, `fade.closed_form`).

No weight gradient is ever kept: each is folded into its accumulator as it appears (`fade_kernels.GradientMagnitude`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fade.backbones import Backbone
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import LocateConfig
from fade.errors import FadeError
from fade.latents import Latents
from fade.noise import epoch_order, loss_scale, step_generator
from fade.progress import progress_bar
from fade.regions import Region, embed, matrix_shape, target_shapes
from fade_kernels import BitMask, GradientMagnitude, select_top_fraction, weight_shape


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
    latents: Latents | None,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
    progress: bool = False,
    within: Collection[str] | None = None,
    regions: Mapping[str, Region] | None = None,
) -> Located:
    """Saliency of `layers` (name to base layer) on the latents, and the top `config.keep` of it as masks.

    `prompts` has every prompt of `latents`. The weights are frozen meanwhile; the denoiser's
    adapters must be off. With `within`, `config.keep` is a fraction of all layers as ever, but only those named may
    hold any of it; `config.saliency` must be a gradient's or `random`, and `latents` may be None for the latter. Of a
    layer with a region, that counts alone. Raises FadeError where `keep` selects nothing.
    """
    regions = regions or {}
    chosen = layers if within is None else {name: layers[name] for name in layers if name in within}
    shapes = target_shapes(chosen, regions)
    if config.granularity == "none":
        masks = {name: BitMask.full(shape) for name, shape in shapes.items()}
        return located_in(layers, masks, {}, 0.0, regions)
    saliency = measure_saliency(backbone, chosen, latents, prompts, config, seed, progress, regions)
    spread = {name: (value.mean().item(), value.max().item()) for name, value in saliency.items()}
    if config.scaling == "module":
        for name, value in saliency.items():
            value.div_(max(spread[name][0], torch.finfo(value.dtype).tiny))
    keep = config.keep
    if within is not None:
        of_chosen = sum(unit_count(shape, config.granularity, config.tile) for shape in shapes.values())
        # Half a unit more: the fraction must not round below the count.
        keep = min(1.0, (kept_units(layers, config, regions) + 0.5) / of_chosen)
    try:
        selection = select_top_fraction(list(saliency.values()), keep, config.granularity, config.tile)
    except ValueError as error:
        raise FadeError(str(error)) from error
    return located_in(layers, dict(zip(saliency, selection.masks, strict=True)), spread, selection.threshold, regions)


def unit_count(shape: Sequence[int], granularity: str, tile: int) -> int:
    """What a weight [N, K] counts for in a selection: entries, tiles, rows and columns, or one."""
    rows, columns = shape
    counts = {
        "element": rows * columns, "tile": -(-rows // tile) * -(-columns // tile), "channel": rows + columns,
        "module": 1,
    }  # fmt: skip
    return counts[granularity]


def kept_units(
    layers: Mapping[str, nn.Module], config: LocateConfig, regions: Mapping[str, Region] | None = None
) -> int:
    """How many units `keep` leaves of these layers, or their regions. Raises FadeError where that is none."""
    shapes = target_shapes(layers, regions or {})
    total = sum(unit_count(shape, config.granularity, config.tile) for shape in shapes.values())
    count = math.floor(config.keep * total)
    if count == 0:
        raise FadeError(
            f"keep {config.keep} selects none of {total} {config.granularity} units: use at least {1 / total:.3g}"
        )
    return count


def measure_saliency(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents | None,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
    progress: bool = False,
    regions: Mapping[str, Region] | None = None,
) -> dict[str, Tensor]:
    """Unscaled saliency by layer, float32, each of its weight's shape, or its region's; `auto` is `distillation`."""
    slices = {name: region.slices for name, region in (regions or {}).items()}
    if config.saliency == "random":
        generator = step_generator(seed, "random saliency", 0)
        shapes = {name: regions[name].shape if name in slices else weight_shape(m) for name, m in layers.items()}
        return {name: torch.rand(shapes[name], generator=generator).to(m.weight.device) for name, m in layers.items()}
    batches = config.passes * -(-len(latents.forget) // config.batch_size)
    contrast = config.saliency == "contrast"
    with progress_bar("locating", batches * (2 if contrast else 1), progress) as advance:

        def accumulate(part: str, clean: Tensor, rows: Tensor, surrogates: Tensor | None) -> dict[str, Tensor]:
            scale = loss_scale(backbone.dtype, min(config.batch_size, len(clean)) * clean[0].numel())
            with GradientMagnitude(layers, per_sample=config.per_sample, regions=slices) as magnitude:
                for batch in range(batches):
                    index = epoch_order(seed, part, len(clean), batch, config.batch_size)
                    generator = step_generator(seed, part, batch)
                    taught = None if surrogates is None else prompts.conditioning.rows(surrogates[index])
                    read = prompts.conditioning.rows(rows[index])
                    _backward(backbone, clean[index], read, taught, generator, scale)
                    advance()
            for value in magnitude.saliency.values():
                value.div_(scale)
            return magnitude.saliency

        forget, surrogates = prompts.rows(latents.forget_prompts), prompts.rows(latents.surrogate_prompts)
        teacher = surrogates if config.saliency in ("distillation", "auto") else None
        saliency = accumulate("locate forget", latents.forget, forget, teacher)
        if contrast:
            common = accumulate("locate retain", latents.retain, prompts.rows(latents.retain_prompts), None)
            for name, value in saliency.items():
                value.div_(common[name] + common[name].mean().clamp_min(torch.finfo(value.dtype).tiny))
    return saliency


def _backward(
    backbone: Backbone,
    clean: Tensor,
    prompts: Conditioning,
    surrogates: Conditioning | None,
    generator: torch.Generator,
    scale: float,
) -> None:
    """One backward pass of the denoising loss, or, with `surrogates`, of the distillation loss, times `scale`."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = backbone.draw_times(len(clean), generator).to(clean.device)
    noised = backbone.add_noise(clean, noise, times)
    if surrogates is None:
        target = backbone.target(clean, noise, times)
    else:
        with torch.no_grad():
            target = backbone.predict(noised, times, surrogates)
    loss = F.mse_loss(backbone.predict(noised, times, prompts).float(), target.float())
    (scale * loss).backward()


def _empty(layer: nn.Module) -> BitMask:
    return BitMask.pack(torch.zeros(matrix_shape(layer), dtype=torch.bool, device=layer.weight.device))


def located_in(
    layers: Mapping[str, nn.Module],
    masks: Mapping[str, BitMask],
    spread: Mapping[str, tuple[float, float]],
    threshold: float,
    regions: Mapping[str, Region] | None = None,
) -> Located:
    """What is located in `layers`, empty masks in those of which `masks` has none.

    Of layers with a region, `masks` are the region's; those of the result are the whole weight's, and what they count
    and how dense they are is the region's again. `spread` is the mean and the largest saliency of each layer, before
    scaling; empty where none was measured.
    """
    regions = regions or {}
    masks = embed(masks, layers, regions)
    masks = {name: masks[name] if name in masks else _empty(layer) for name, layer in layers.items()}
    areas = {name: rows * columns for name, (rows, columns) in target_shapes(layers, regions).items()}
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
                "density": float(f"{mask.count / max(1, areas[name]):.5g}"),
                "tiles_occupied": float(f"{mask.occupancy(32).float().mean().item():.5g}"),
            }
        )
    return Located(
        masks=masks,
        layers=records,
        threshold=float(threshold),
        selected=sum(mask.count for mask in masks.values()),
        total=sum(areas.values()),
    )
