"""Stage 1, locate: the saliency of every target weight, and the mask of those that may change.

Saliency is the gradient magnitude of a loss, summed over passes over the forget latents (FADE, arXiv 2602.07058,
section 3): S = Σ_b |∂ℓ_b/∂W|, at random noise and timesteps. The losses, with ε_θ the frozen model:

- `denoising` (the paper's)   ℓ = ‖ε_θ(z_t, c_forget) − target‖²
- `distillation`              ℓ = ‖ε_θ(z_t, c_forget) − ε_θ(z_t, c_surrogate)‖², what must change for this surrogate
- `contrast`                  denoising on the forget set, divided by (the same on the retain set + its layer mean):
                              what is special to the concept
- `guided`                    ‖(1 + g) ε_θ(z_t, c_forget) − g ε_θ(z_t, ∅) − target‖², the gradients summed before
                              the magnitude is taken: S = |Σ_b ∂ℓ_b/∂W| (SalUn, arXiv 2310.12508, as its code has it)
- `random`                    uniform noise, the control

or, with no gradient at all, the entries of the solved edit that cost most to drop (`closed-form`, `fade.closed_form`).

No weight gradient is ever kept: each is folded into its accumulator as it appears (`fade_kernels.GradientMagnitude`).
Where the accumulators are, and which layers are measured together, is planned by what memory there is
(`fade.saliency_plan`); what is located does not depend on it.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fade import processes
from fade.backbones import Backbone
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import LocateConfig
from fade.errors import FadeError
from fade.latents import Latents
from fade.measure import free_memory, live_bytes
from fade.noise import epoch_order, loss_scale, step_generator
from fade.progress import progress_bar, tell
from fade.regions import Region, embed, matrix_shape, target_shapes
from fade.saliency_plan import FLOAT, SaliencyPlan, plan_saliency
from fade_kernels import BitMask, GradientMagnitude, GroupedSelection, weight_shape
from fade_kernels.saliency import Mode

SHARE_OF_FREE = 0.9
"""Of what memory is free, how much is planned with where no budget is given."""


@dataclass(frozen=True)
class Located:
    """Masks by layer, and what is worth telling about them: a record per layer, the threshold, the counts, and the plan
    by which saliency was measured (`SaliencyPlan.record`), if it was."""

    masks: dict[str, BitMask]
    layers: list[dict[str, Any]]
    threshold: float
    selected: int
    total: int
    plan: dict[str, Any] | None = None


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
    layer with a region, that counts alone. Raises FadeError where `keep` selects nothing, where the memory budget does
    not suffice, and where a gradient is NaN.
    """
    regions = regions or {}
    chosen = layers if within is None else {name: layers[name] for name in layers if name in within}
    shapes = target_shapes(chosen, regions)
    if config.granularity == "none":
        masks = {name: BitMask.full(shape) for name, shape in shapes.items()}
        return located_in(layers, masks, {}, 0.0, regions)
    plan = _plan_with_passes(backbone, layers, latents, prompts, config, seed, within, regions)
    tell(plan.remark(str(_device(chosen))), progress)
    keep = config.keep
    if within is not None:
        # Half a unit more: the fraction must not round below the count.
        keep = min(1.0, (kept_units(layers, config, regions) + 0.5) / _units(shapes, config))
    spread = {}
    with _told():
        selection = GroupedSelection(plan.weights, keep, config.granularity, config.tile)
    for saliency in saliency_by_group(
        backbone, chosen, latents, prompts, config, seed, plan.groups, plan.place == "host", progress, regions
    ):
        for name, value in saliency.items():
            spread[name] = _scale_(value, layers[name].weight.device, config.scaling)
            if math.isnan(spread[name][0]):
                raise FadeError(
                    f"the saliency of {name} holds NaN: gradients of the {backbone.dtype} model are no numbers. Load "
                    "the pipeline in another dtype (torch.bfloat16 or torch.float32), and see whether its weights are "
                    "finite"
                )
        with _told():
            _add(selection, list(saliency.values()))
        saliency.clear()  # before the next group's accumulators are there
    with _told():
        selected = selection.result()
    masks = {name: mask.to(layers[name].weight.device) for name, mask in zip(chosen, selected.masks, strict=True)}
    return located_in(layers, masks, spread, selected.threshold, regions, plan.record())


def _add(selection: GroupedSelection, saliency: Sequence[Tensor]) -> None:
    """Adds layers that follow one another on one device together: a model may be spread over several."""
    for _, alike in groupby(saliency, key=lambda value: value.device):
        selection.add(list(alike))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What selection says of its input, as FadeError."""
    try:
        yield
    except ValueError as error:
        raise FadeError(str(error)) from error


def _scale_(saliency: Tensor, device: torch.device, scaling: str) -> tuple[float, float]:
    """A layer's mean and largest saliency; then scales it in place, on its device wherever it is kept."""
    here = saliency.to(device)
    mean, largest = here.mean().item(), here.max().item()
    if scaling == "module":
        here.div_(max(mean, torch.finfo(here.dtype).tiny))
        if here is not saliency:
            saliency.copy_(here)
    return mean, largest


def unit_count(shape: Sequence[int], granularity: str, tile: int) -> int:
    """What a weight [N, K] counts for in a selection: entries, tiles, rows and columns, or one."""
    rows, columns = shape
    counts = {
        "element": rows * columns, "tile": -(-rows // tile) * -(-columns // tile), "channel": rows + columns,
        "module": 1,
    }  # fmt: skip
    return counts[granularity]


def _units(shapes: Mapping[str, Sequence[int]], config: LocateConfig) -> int:
    return sum(unit_count(shape, config.granularity, config.tile) for shape in shapes.values())


def kept_units(
    layers: Mapping[str, nn.Module], config: LocateConfig, regions: Mapping[str, Region] | None = None
) -> int:
    """How many units `keep` leaves of these layers, or their regions. Raises FadeError where that is none."""
    total = _units(target_shapes(layers, regions or {}), config)
    count = math.floor(config.keep * total)
    if count == 0:
        raise FadeError(
            f"keep {config.keep} selects none of {total} {config.granularity} units: use at least {1 / total:.3g}"
        )
    return count


def plan_of(
    layers: Mapping[str, nn.Module],
    config: LocateConfig,
    within: Collection[str] | None = None,
    regions: Mapping[str, Region] | None = None,
    passes: int = 0,
    pass_bytes: int = 0,
) -> SaliencyPlan:
    """How `locate` measures the saliency of these layers where a backward pass takes `pass_bytes`, and a group so many
    passes. Raises FadeError where that does not fit into `config.memory_budget`, or into what is free."""
    regions = regions or {}
    chosen = {name: layer for name, layer in layers.items() if within is None or name in within}
    shapes = target_shapes(chosen, regions)
    units = _units(shapes, config)
    if config.granularity == "element":
        units = min(units, kept_units(layers, config, regions))
    on_cpu = _device(chosen).type == "cpu"
    # Processes measure the same groups at the same time, so what the one with the least has decides for all.
    limits = processes.everyones([_budget(chosen, config), _free(torch.device("cpu")), pass_bytes])
    budgets, hosts, passing = zip(*limits, strict=True)
    pass_bytes = max(passing)
    return plan_saliency(
        {name: rows * columns for name, (rows, columns) in shapes.items()},
        min(budgets),
        None if on_cpu else min(hosts),
        accumulators=accumulator_sets(config),
        kept=units,
        pass_bytes=pass_bytes,
        passes=passes,
    )


def accumulator_sets(config: LocateConfig) -> int:
    """How many accumulators a weight has while its saliency is measured: one for each set of latents."""
    return 2 if config.saliency == "contrast" else 1


def _budget(layers: Mapping[str, nn.Module], config: LocateConfig) -> int:
    return config.budget_bytes or _free(_device(layers))


def _free(device: torch.device) -> int:
    """What may be taken of a device's free memory: host memory is shared with the other processes on this machine."""
    sharing = processes.on_this_machine() if device.type == "cpu" else 1
    return int(SHARE_OF_FREE * free_memory(device) / sharing)


def _device(layers: Mapping[str, nn.Module]) -> torch.device:
    return next(iter(layers.values())).weight.device


def _plan_with_passes(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents | None,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
    within: Collection[str] | None,
    regions: Mapping[str, Region],
) -> SaliencyPlan:
    """The plan, with what a backward pass takes where that may matter."""
    if config.saliency == "random":
        return plan_of(layers, config, within, regions)
    chosen = {name: layer for name, layer in layers.items() if within is None or name in within}
    sets = accumulator_sets(config)
    accumulators = FLOAT * sets * sum(map(math.prod, target_shapes(chosen, regions).values()))
    # Looking costs a pass, if a small one. Where nobody gave a budget and accumulators are few it would change nothing.
    few = config.memory_budget is None and accumulators < _budget(chosen, config) / 10
    needed = 0 if few else measure_pass(backbone, chosen, latents, prompts, config, seed)
    return plan_of(layers, config, within, regions, sets * _batches(latents, config), needed)


def _batches(latents: Latents, config: LocateConfig) -> int:
    return config.passes * -(-len(latents.forget) // config.batch_size)


def measure_pass(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
) -> int:
    """Bytes that a backward pass over a batch takes beside the model and the accumulators: what one over a single
    latent takes, times the batch, which counts what does not grow with it too often rather than not at all."""
    nothing = {name: (slice(0, 0), slice(0, 0)) for name in layers}
    one, generator = torch.tensor([0]), step_generator(seed, "locate memory", 0)
    with GradientMagnitude(layers, regions=nothing), live_bytes(backbone.device) as most:
        read = prompts.conditioning.rows(prompts.rows(latents.forget_prompts)[one])
        empty = backbone.negative() if config.saliency == "guided" else None
        _backward(backbone, latents.forget[one], read, None, generator, 1.0, empty, config.guidance)
    return most() * config.batch_size


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
    together = [tuple(layers)]
    (saliency,) = saliency_by_group(
        backbone, layers, latents, prompts, config, seed, together, progress=progress, regions=regions
    )  # fmt: skip
    return saliency


def saliency_by_group(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents | None,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
    groups: Sequence[Sequence[str]],
    on_host: bool = False,
    progress: bool = False,
    regions: Mapping[str, Region] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """`measure_saliency` of one group of layers after another, which together are all of them, in their order: the same
    values as at once, in host memory with `on_host`. Each is the caller's, who frees it before taking the next."""
    slices = {name: region.slices for name, region in (regions or {}).items()}
    if config.saliency == "random":
        generator = step_generator(seed, "random saliency", 0)
        for names in groups:
            group = {}
            for name in names:
                shape = regions[name].shape if name in slices else weight_shape(layers[name])
                device = "cpu" if on_host else layers[name].weight.device
                group[name] = torch.rand(shape, generator=generator).to(device)
            yield group
        return
    count = _batches(latents, config)
    forget, surrogates = prompts.rows(latents.forget_prompts), prompts.rows(latents.surrogate_prompts)
    teacher = surrogates if config.saliency in ("distillation", "auto") else None
    guided = config.saliency == "guided"
    empty = backbone.negative() if guided else None
    steps = len(processes.own(range(count))) * accumulator_sets(config) * len(groups)
    with progress_bar("locating", steps, progress) as advance:
        for names in groups:
            group = {name: layers[name] for name in names}
            common = {"regions": regions, "on_host": on_host, "batches": count, "advance": advance}
            saliency = gradient_sums(
                backbone, group, latents.forget, forget, prompts, config, seed, "locate forget",
                mode="signed" if guided else "abs", surrogates=teacher, empty=empty, **common,
            )  # fmt: skip
            if config.saliency == "contrast":
                retained = prompts.rows(latents.retain_prompts)
                others = gradient_sums(
                    backbone, group, latents.retain, retained, prompts, config, seed, "locate retain", **common
                )
                for name, value in saliency.items():
                    _contrast_(value, others.pop(name), group[name].weight.device)
            yield saliency


def gradient_sums(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    clean: Tensor,
    asked: Tensor,
    prompts: EncodedPrompts,
    config: LocateConfig,
    seed: int,
    stream: str,
    *,
    mode: Mode = "abs",
    surrogates: Tensor | None = None,
    empty: Conditioning | None = None,
    regions: Mapping[str, Region] | None = None,
    on_host: bool = False,
    batches: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Gradients of a loss with respect to the layers' weights, summed over batches of latents noised anew.

    Args:
        clean: latents [n, C, h, w]; asked: the rows of `prompts` that go with them, int64 [n].
        config: of it the size of a batch, `per_sample`, `passes` and `guidance` count.
        stream: names the random numbers; another name draws others.
        mode: Σ_b |g_b| (abs), |Σ_b g_b| (signed) or Σ_b g_b² (square).
        surrogates: rows to distil from instead of the denoising loss; empty: what classifier-free guidance leads away
            from, for the guided loss.
        batches: how many; None goes `config.passes` times through all.

    Returns float32 by layer, of its weight's shape or its region's. In a run of several processes they share the
    batches, and all get the sums.
    """
    if batches is None:
        batches = config.passes * -(-len(clean) // config.batch_size)
    slices = {name: region.slices for name, region in (regions or {}).items()}
    scale = loss_scale(backbone.dtype, min(config.batch_size, len(clean)) * clean[0].numel())
    with GradientMagnitude(layers, mode, config.per_sample, slices, on_host) as magnitude:
        # Of a batch the magnitude of its sum counts, so processes share batches and not samples.
        for batch in processes.own(range(batches)):
            index = epoch_order(seed, stream, len(clean), batch, config.batch_size)
            generator = step_generator(seed, stream, batch)
            taught = None if surrogates is None else prompts.conditioning.rows(surrogates[index])
            read = prompts.conditioning.rows(asked[index])
            _backward(backbone, clean[index], read, taught, generator, scale, empty, config.guidance)
            advance()
        processes.sum_(magnitude.saliency.values())  # before the magnitude of signed sums is taken
    for value in magnitude.saliency.values():
        value.div_(scale**2 if mode == "square" else scale)
    return magnitude.saliency


def _contrast_(saliency: Tensor, common: Tensor, device: torch.device) -> None:
    """Divides by what is common to all plus its mean, in place, on the layer's device wherever both are kept."""
    here, common = saliency.to(device), common.to(device)
    common.add_(common.mean().clamp_min(torch.finfo(common.dtype).tiny))
    here.div_(common)
    if here is not saliency:
        saliency.copy_(here)


def _backward(
    backbone: Backbone,
    clean: Tensor,
    prompts: Conditioning,
    surrogates: Conditioning | None,
    generator: torch.Generator,
    scale: float,
    empty: Conditioning | None = None,
    guidance: float = 0.0,
) -> None:
    """One backward pass of the denoising loss, or, with `surrogates`, of the distillation loss, times `scale`; with
    `empty` of what is predicted with guidance."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = backbone.draw_times(len(clean), generator).to(clean.device)
    noised = backbone.add_noise(clean, noise, times)
    if surrogates is None:
        target = backbone.target(clean, noise, times)
    else:
        with torch.no_grad():
            target = backbone.predict(noised, times, surrogates)
    if getattr(backbone.denoiser, "is_gradient_checkpointing", False):
        # A reentrant checkpoint makes a graph only where one of its inputs needs a gradient.
        prompts = prompts.detach()
        for tensor in (noised, *prompts.tensors().values()):
            if tensor.is_floating_point() and not tensor.is_inference():
                tensor.requires_grad_(True)
    predicted = backbone.predict(noised, times, prompts).float()
    if empty is not None:
        without = backbone.predict(noised, times, empty.repeat(len(clean))).float()
        predicted = (1 + guidance) * predicted - guidance * without
    loss = F.mse_loss(predicted, target.float())
    (scale * loss).backward()


def _empty(layer: nn.Module) -> BitMask:
    return BitMask.pack(torch.zeros(matrix_shape(layer), dtype=torch.bool, device=layer.weight.device))


def located_in(
    layers: Mapping[str, nn.Module],
    masks: Mapping[str, BitMask],
    spread: Mapping[str, tuple[float, float]],
    threshold: float,
    regions: Mapping[str, Region] | None = None,
    plan: dict[str, Any] | None = None,
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
        plan=plan,
    )
