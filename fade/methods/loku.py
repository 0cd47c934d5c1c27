"""LoKU (Cha et al., ICLR 2025, arXiv 2408.06621): low-rank factors that begin where the concept is (FILA).

Of a weight W [N, K] with importances I_f and I_r, the mean squared gradients of the concept and of the rest,

    R = I_f / (I_r + ε),   ρ_j = sqrt(Σ_k R_jk),   U S Vᵀ = svd_r(diag(ρ) W),   S ← S / s,
    A₀ = (V √S)ᵀ,   B₀ = diag(1 / (ρ + ε)) U √S,   W_res = W − s B₀ A₀,   ε = 1e-5,

with s the adapter's scale, and A and B are trained from A₀ and B₀ while W_res is frozen. The authors write W_res into
the model, so that theirs cannot be taken off without the original. Here the adapter itself holds what was taken out:
its factors are [B, −B₀] and [A; A₀], of twice the rank, of which the second half is not trained. So it begins as no
change (up to rounding), W stays, and

    W + s [B, −B₀] [A; A₀] = W_res + s B A.

The paper trains language models on an inverted hinge loss over next tokens, which diffusion has not. The loss is FADE's
distillation here, and I_f and I_r are of the denoising loss on the forget and the retain latents: a reconstruction.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.config import Config
from fade.errors import FadeError
from fade.importance import Importance
from fade.methods.base import Editing, Method
from fade.objective import Learn, Objective, Training
from fade.quantised import float_weight
from fade.regions import matrix_shape

EPSILON = 1e-5
EXTRA, ROUNDS = 8, 4
"""Directions beside the rank, and passes over the matrix, of the randomised decomposition."""


def fila(
    weight: Tensor, forget: Tensor, retain: Tensor, rank: int, scale: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A₀ [r, K] and B₀ [N, r] in the weight's dtype, float32 or float64.

    Args:
        weight, forget, retain: W, I_f and I_r, [N, K] each; importances not negative.
        rank: r, at most min(N, K). scale: s.
        seed: of the randomised decomposition (`torch.svd_lowrank`, as in the authors' code); torch's global generators
            are as before afterwards.

    Importances are taken relative to the mean of I_r, so that ε is the same share of them in every model (ours: the
    authors' are sums over a language model's tokens).
    """
    mean = retain.mean().clamp_min(torch.finfo(retain.dtype).tiny)
    rows = (forget / mean / (retain / mean + EPSILON)).sum(1).sqrt().to(weight)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(rows[:, None] * weight, q=min(*weight.shape, rank + EXTRA), niter=ROUNDS)
    root = (s[:rank] / scale).sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root) / (rows[:, None] + EPSILON)


def start(editing: Editing) -> Mapping[str, tuple[Tensor, Tensor]]:
    """[A₀; A₀] and [B₀, −B₀] of every layer, twice the settings' rank."""
    settings, found = editing.config.overwrite, {}
    importance = Importance(
        editing.backbone, editing.layers, editing.latents, editing.prompts, editing.config.locate, editing.config.seed,
        regions=editing.regions,
    )  # fmt: skip
    for name, of in importance.measure(editing.progress):
        rows, columns = matrix_shape(editing.layers[name])
        weight = float_weight(editing.layers[name]).reshape(rows, columns)
        slices = editing.regions[name].slices if name in editing.regions else (slice(None), slice(None))
        inner = weight[slices].float()
        if settings.rank > min(inner.shape):
            raise FadeError(
                f"{name} has {inner.shape[0]} rows and {inner.shape[1]} columns, of which loku takes no rank "
                f"{settings.rank}: lower rank to {min(inner.shape)}"
            )
        scale = settings.alpha / settings.rank
        own = fila(inner, of["forget"], of["retain"], settings.rank, scale, editing.config.seed)
        a, b = inner.new_zeros(settings.rank, columns), inner.new_zeros(rows, settings.rank)
        a[:, slices[1]], b[slices[0]] = own
        found[name] = (torch.cat([a, a]).cpu(), torch.cat([b, -b], 1).cpu())
    return found


class HalfFrozen(Objective):
    """FADE's distillation of the first half of the factors."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._pairs = [layer.adapter_parameters(training.adapter.name) for layer in self._layers]

    def step(self, learn: Learn, weights: tuple[float, float]) -> tuple[float, float]:
        losses = super().step(learn, weights)
        for lora_a, lora_b in self._pairs:
            if lora_a.grad is not None:  # of a layer that the model does not call
                lora_a.grad[self.config.rank :].zero_()
                lora_b.grad[:, self.config.rank :].zero_()
        return losses


def check(backbone: Backbone, config: Config) -> None:
    if config.in_values:
        raise FadeError("the method loku trains factors; leave parameters at factors")
    if config.overwrite.weight_decay:
        raise FadeError("the method loku keeps half of its factors, which weight_decay would change: leave it at 0")


LOKU = Method(
    name="loku",
    summary="Distils low-rank factors that begin at the directions which the concept needs most and the rest least.",
    source="LoKU, arXiv 2408.06621, with FADE's loss",
    settings={"locate__granularity": "none", "overwrite__parameters": "factors", "overwrite__learning_rate": 1e-3},
    objective=HalfFrozen,
    start=start,
    denoises=("forget", "retain"),
    ranks=2,
    accumulators=2,
    check=check,
)
