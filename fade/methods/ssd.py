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
in the paper, importances depend on the size of a batch. Here they are of single samples (`locate.per_sample`), of which
there must be many, drawn as the model was trained: with few batches I_f > α I_D is mostly chance. So measured, with α 2
of DigitCanvas's "three", where with batches no α and λ forgot it and kept the rest (80 pictures):

    λ 1   UA 75, IRA 93.1, CRA 100;      λ 0.3   87.5, 90.3, 100;      λ 0.3, α 4   37.5, 95.8, 100

and of "neon", with λ 0.3, UA 100, IRA 91.4 and CRA 97.5. The paper's α 10 chooses next to nothing: what distinguishes a
digit has hardly a weight to itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.errors import FadeError
from fade.importance import Importance
from fade.methods.base import AS_THE_MODEL_DRAWS, Edit, Editing, Method
from fade.quantised import float_weight
from fade.regions import matrix_shape
from fade.saliency import located_in
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

    alpha: float = 2.0
    """α: a weight is dampened where it is more than so many times as important to the concept as to the rest. The
    paper's classifiers take 10, with λ 1."""
    dampening: float = 0.3
    """λ: dampened weights become λ I_D / I_f of what they were."""
    exponent: float = 1.0
    """p, of that ratio."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise FadeError(f"the option {name} of ssd must be a positive, finite number, not {value}")


def edit(editing: Editing) -> Edit:
    options, layers, regions = editing.options, editing.layers, editing.regions
    importance = Importance(
        editing.backbone, layers, editing.latents, editing.prompts, editing.config.locate, editing.config.seed,
        regions=regions,
    )  # fmt: skip
    masks, deltas, spread = {}, {}, {}
    for name, of in importance.measure(editing.progress):
        spread[name] = (of["forget"].mean().item(), of["forget"].max().item())
        factors = dampening_factors(
            of["forget"], of["retain"], options.alpha, options.dampening, options.exponent
        )  # fmt: skip
        masks[name] = BitMask.pack(factors < 1)
        weight = float_weight(layers[name]).reshape(matrix_shape(layers[name]))
        if name in regions:
            weight = weight[regions[name].slices]
        deltas[name] = gather_masked(((factors - 1) * weight.to(factors)).contiguous(), masks[name]).cpu()
    located = located_in(layers, masks, spread, options.alpha, regions, importance.plan.record())
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
    settings={
        **AS_THE_MODEL_DRAWS,
        "locate__targets": ("all",),  # as the paper has every parameter
        "data__forget_samples": 48,
        "locate__passes": 4,
        "locate__per_sample": True,
    },
    trains=False,
    edit=edit,
    accumulators=2,
    denoises=("forget", "retain"),
    options=Options,
)
