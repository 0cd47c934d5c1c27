"""Negated LoRA (task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089; what users of LoRAs do by a negative
scale): train a LoRA to be good at the concept, then subtract it.

    Δ⁺ = argmin ‖ε_{θ+Δ}(z_t, c) − ε‖²,   Δ = −strength · Δ⁺

The file holds Δ, so that it acts at scale 1 like every other. Ours: without pictures of the concept, z are those that
the model drew of it, of which it has little to learn; give some. Of DigitCanvas's "three" (80 pictures) UA was 38, IRA
95.8 and CRA 100; subtracted twice, UA 38 and IRA 88.9: it does not forget.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade.adapter import Adapter
from fade.errors import FadeError
from fade.methods.base import Method
from fade.methods.esd import DENSE
from fade.objective import Batch, Objective


@dataclass(frozen=True)
class Options:
    """Negated LoRA's own settings."""

    strength: float = 1.0
    """How much of what was learned is subtracted."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 100:
            raise FadeError(f"options.strength must be in (0, 100], not {self.strength}")


class Denoising(Objective):
    """What the LoRA is trained on before it is negated."""

    losses = ("learn", "drift")

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(
            batch,
            lambda half: self.backbone.target(half.clean, half.noise, half.times),
            self.frozen(batch.noised, batch.times, batch.asked),
        )


@torch.no_grad()
def negate(adapter: Adapter, options: Options) -> None:
    """Turns what the adapter adds around: the factor B, or the values, times −strength."""
    for layer in adapter.layers.values():
        changed: Any = layer.adapter_parameters(adapter.name)[-1]
        changed.mul_(-options.strength)


NEGATED_LORA = Method(
    name="negated-lora",
    summary="Trains a LoRA to draw the concept, then subtracts it.",
    source="task arithmetic, ICLR 2023, arXiv 2212.04089",
    settings=DENSE,
    denoises=("forget",),
    options=Options,
    objective=Denoising,
    finish=negate,
)
