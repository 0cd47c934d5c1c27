"""Selective Synaptic Dampening (SSD; Foster, Schoepf and Brintrup, AAAI 2024, arXiv 2308.07707): no training; weights
that matter far more to the concept than to everything else are made smaller.

With the diagonal of the Fisher information, I_i = mean over batches of (∂L/∂θ_i)², of the concept (I_f) and of the rest
(I_D), each weight with I_f > α I_D becomes

    θ_i ← min((λ I_D / I_f)^p, 1) θ_i.

Each squared gradient is folded into its accumulator as it appears, and the result is the sparse change (factor − 1) θ
of the chosen weights, so that, unlike the paper's, it can be taken off. The surrogate has no part in it: what the
concept is answered with is whatever is left.

The paper is about classifiers. Here L is the denoising loss, I_f is measured on the forget latents with their prompts,
and I_D on the retain latents with theirs (the paper's is of all data, of which the forget set is a vanishing part). As
in the paper, importances depend on the size of a batch (`locate.batch_size`; `locate.per_sample` makes them independent
of it).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fade.errors import FadeError
from fade.methods.base import Edit, Editing, Method
from fade.progress import progress_bar, tell
from fade.quantised import float_weight
from fade.regions import matrix_shape
from fade.saliency import gradient_sums, located_in, measure_pass, plan_of
from fade_kernels import BitMask, gather_masked


def dampening_factors(
    forget: Tensor, retain: Tensor, alpha: float, dampening: float = 1.0, exponent: float = 1.0
) -> Tensor:
    """What each weight is multiplied by: min((λ I_D / I_f)^p, 1) where I_f > α I_D, and 1 elsewhere.

    Args:
        forget, retain: importances I_f and I_D, not negative, of one shape and dtype (float32 or float64).
        alpha: α, how many times more important to the concept than to the rest a weight must be.
        dampening: λ. exponent: p.

    Returns a tensor of their shape and dtype, in [0, 1].
    """
    chosen = forget > alpha * retain
    ratio = dampening * retain / torch.where(chosen, forget, 1.0)
    return torch.where(chosen, ratio.pow(exponent).clamp_max(1.0), 1.0)


@dataclass(frozen=True)
class Options:
    """Settings of SSD."""

    alpha: float = 10.0
    """α: a weight is dampened where it is more than so many times as important to the concept as to the rest."""
    dampening: float = 1.0
    """λ: dampened weights become λ I_D / I_f of what they were."""
    exponent: float = 1.0
    """p, of that ratio."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise FadeError(f"the option {name} of ssd must be a positive, finite number, not {value}")


def importances(
    editing: Editing,
    group: Mapping[str, nn.Module],
    part: Literal["forget", "retain"],
    on_host: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The mean squared gradient of the denoising loss on one part of the latents, float32 by layer, of its weight's
    shape or its region's. Arguments as of `gradient_sums`."""
    latents, config = editing.latents, editing.config.locate
    clean, prompts = getattr(latents, part), getattr(latents, f"{part}_prompts")
    sums = gradient_sums(
        editing.backbone, group, clean, editing.prompts.rows(prompts), editing.prompts, config, editing.config.seed,
        f"importance {part}", mode="square", regions=editing.regions, on_host=on_host,
        advance=advance,
    )  # fmt: skip
    for value in sums.values():
        value.div_(batches_of(editing, part))
    return sums


def batches_of(editing: Editing, part: str) -> int:
    """Backward passes that `importances` takes."""
    config = editing.config.locate
    return config.passes * -(-len(getattr(editing.latents, part)) // config.batch_size)


def edit(editing: Editing) -> Edit:
    """Both accumulators at once of as many layers as there is memory for."""
    options, layers, regions = editing.options, editing.layers, editing.regions
    # As much memory as for a contrast of all weights: two accumulators each, any of which may be chosen.
    locating = dataclasses.replace(editing.config.locate, saliency="contrast", granularity="element", keep=1.0)
    passes = batches_of(editing, "forget") + batches_of(editing, "retain")
    needed = measure_pass(editing.backbone, layers, editing.latents, editing.prompts, locating, editing.config.seed)
    plan = plan_of(layers, locating, None, regions, passes, needed)
    tell(plan.remark(str(editing.backbone.device)), editing.progress)
    masks, deltas, spread = {}, {}, {}
    with progress_bar("measuring importance", passes * len(plan.groups), editing.progress) as advance:
        for names in plan.groups:
            group, on_host = {name: layers[name] for name in names}, plan.place == "host"
            forget = importances(editing, group, "forget", on_host, advance=advance)
            retain = importances(editing, group, "retain", on_host, advance=advance)
            for name in names:
                device = layers[name].weight.device
                of_concept, of_rest = (sums.pop(name).flatten(1).to(device) for sums in (forget, retain))
                spread[name] = (of_concept.mean().item(), of_concept.max().item())
                factors = dampening_factors(
                    of_concept, of_rest, options.alpha, options.dampening, options.exponent
                )  # fmt: skip
                masks[name] = BitMask.pack(factors < 1)
                weight = float_weight(layers[name]).reshape(matrix_shape(layers[name]))
                if name in regions:
                    weight = weight[regions[name].slices]
                deltas[name] = gather_masked(((factors - 1) * weight.to(factors)).contiguous(), masks[name]).cpu()
    located = located_in(layers, masks, spread, options.alpha, regions, plan.record())
    if not located.selected:
        raise FadeError(
            f"no weight is more than {options.alpha:g} times as important to the concept as to the rest, so that ssd "
            "changes nothing; lower its option alpha"
        )
    return Edit(located, deltas)


SSD = Method(
    name="ssd",
    summary="Dampens, without training, the weights that matter far more to the concept than to the rest.",
    source="Selective Synaptic Dampening, arXiv 2308.07707",
    trains=False,
    edit=edit,
    options=Options,
)
