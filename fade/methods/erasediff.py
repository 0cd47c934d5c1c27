"""EraseDiff (Wu et al., arXiv 2401.05779): bi-level, retain as well as possible among what has forgotten.

Each step: from a snapshot φ of the adapter K inner steps lower the forget loss, to φ_K; the snapshot is restored, and

    q = L_f(φ) − L_f(φ_K),   g_r = ∇L_r(φ),  g_q = ∇q = ∇L_f(φ)  (φ_K held),   step along g_r + λ g_q

with L_f = ‖ε(z_t, c) − sg ε(z_t, c')‖² and L_r = ‖ε(z_t^r, c_r) − ε‖². The weight λ is, by `barrier`,

- `value`    [η q − ⟨g_r, g_q⟩]₊ / ‖g_q‖², BOME's (Liu et al., NeurIPS 2022, arXiv 2209.08709): the forget loss falls at
             least by η q for a unit step. The only one in which φ_K has a say.
- `cosine`   [η − cos(g_r, g_q)]₊, the authors' code where its λ is negative
- `fixed`    forget_weight, the authors' default; then the method is the weighted sum of both losses

Ours: the snapshot is the adapter, not the model; all K inner steps see the outer step's own batch and noise, where the
authors' go on over the loader, so that φ_K says how far L_f of this very batch falls; they are Adam's with a state of
their own, where the authors' leave theirs in the outer optimiser; the learning rate.

On DigitCanvas (80 pictures) "three" had UA 100, IRA 93.1 and CRA 100, "neon" 100, 100 and 98.8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.config import Config
from fade.errors import FadeError
from fade.methods.base import AS_THE_MODEL_DRAWS, Method
from fade.methods.salun import RandomLabel
from fade.objective import Learn


@dataclass(frozen=True)
class Options:
    """EraseDiff's own settings."""

    inner_steps: int = 2
    """K."""
    barrier: str = "value"
    """How λ is found: `value`, `cosine` or `fixed`."""
    eta: float = 0.1
    """η, how much of the forget loss an outer step is to take off."""
    answer: str = "surrogate"
    """As of SalUn: the concept that the forget prompts are trained to be."""

    def __post_init__(self) -> None:
        if not 1 <= self.inner_steps <= 100:
            raise FadeError(f"options.inner_steps must be from 1 to 100, not {self.inner_steps}")
        if self.barrier not in ("value", "cosine", "fixed"):
            raise FadeError(f"options.barrier must be value, cosine or fixed, not {self.barrier!r}")
        if not 0 <= self.eta < math.inf:
            raise FadeError(f"options.eta must be finite and not negative, not {self.eta}")
        if self.answer not in ("surrogate", "random"):
            raise FadeError(f"options.answer must be surrogate or random, not {self.answer!r}")


class Bilevel(RandomLabel):
    """What EraseDiff trains on."""

    def step(self, learn: Learn, weights: tuple[float, float]) -> tuple[float, float]:
        if self.options.barrier == "fixed":
            return learn(*weights)
        parameters = self.adapter.parameters()
        reached = self.inner(learn, parameters) if self.options.barrier == "value" else 0.0
        _, retain = learn(0.0, 1.0)
        gradients = [parameter.grad.clone() for parameter in parameters]
        forget, _ = learn(1.0, 0.0)
        weight = self.weight(gradients, [parameter.grad for parameter in parameters], forget - reached)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.mul_(weight).add_(gradient)
        return forget, retain

    def inner(self, learn: Learn, parameters: list[Tensor]) -> float:
        """The forget loss after K steps from here; the parameters are restored."""
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.Adam(parameters, self.config.peak_rate)
        for _ in range(self.options.inner_steps):
            learn(1.0, 0.0)
            optimizer.step()
        reached, _ = learn(1.0, 0.0)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        return reached

    def weight(self, retain: list[Tensor], forget: list[Tensor], gap: float) -> float:
        """λ, of the gradients g_r and g_q and of q."""
        product = sum(torch.dot(r.flatten(), f.flatten()).item() for r, f in zip(retain, forget, strict=True))
        of_retain, of_forget = (sum(g.square().sum().item() for g in gradients) for gradients in (retain, forget))
        if of_forget == 0:
            return 0.0
        if self.options.barrier == "cosine":
            cosine = product / math.sqrt(of_retain * of_forget) if of_retain else 0.0
            return max(0.0, self.options.eta - cosine)
        return max(0.0, self.options.eta * gap - product) / of_forget


def unread(config: Config) -> dict[str, str]:
    barrier = config.options["barrier"]
    named, inner = f"the method erasediff with barrier {barrier}", ("options.inner_steps",)
    if barrier == "fixed":
        return dict.fromkeys((*inner, "options.eta"), f"{named} weighs by forget_weight alone")
    weighing = (f"overwrite.{name}" for name in ("forget_weight", "retain_weight", "dual_rate", "dual_bound"))
    why = f"{named} finds how both losses are weighed. Leave it out, or give the option barrier=fixed"
    makes_none = dict.fromkeys(inner, f"{named} makes none") if barrier == "cosine" else {}
    return {**dict.fromkeys(weighing, why), **makes_none}


ERASEDIFF = Method(
    name="erasediff",
    summary="Bi-level: lowers the retain loss among what lowers the forget loss as inner steps show that it can fall.",
    source="EraseDiff, arXiv 2401.05779",
    settings={
        **AS_THE_MODEL_DRAWS,
        "locate__granularity": "none",
        "overwrite__forget_weight": 0.1,
        "overwrite__retain_weight": 1.0,
        "overwrite__learning_rate": 1e-3,
        "overwrite__steps": 100,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
    },
    denoises=("retain",),
    options=Options,
    objective=Bilevel,
    unread=unread,
)
