"""Gradient ascent, the baseline of every unlearning paper: make the denoising loss of the concept worse.

    L = −w_f ‖ε_{θ+Δ}(z_t, c) − ε‖² + w_r ‖ε_{θ+Δ}(z_t^r, c_r) − ε‖²

Nothing bounds it, and it ends in a broken model; so the ascent pauses (ours) while the last step's loss is above
`most`: 1 is what predicting nothing at all costs a model that predicts noise.

On DigitCanvas (80 pictures) "three" had UA 100, IRA 97.2 and CRA 78.8, "neon" 100, 94.3 and 97.5: it forgets and harms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fade.config import Config
from fade.errors import FadeError
from fade.methods.base import AS_THE_MODEL_DRAWS, Method
from fade.objective import Batch, Objective


@dataclass(frozen=True)
class Options:
    """Gradient ascent's own settings."""

    most: float = 0.5
    """Loss above which the ascent pauses; inf never."""

    def __post_init__(self) -> None:
        if math.isnan(self.most) or self.most <= 0:
            raise FadeError(f"options.most must be positive, not {self.most}")


class Ascent(Objective):
    """What gradient ascent trains on."""

    losses = ("denoise the concept", "denoise the rest")

    def target(self, batch: Batch) -> Tensor:
        return self.backbone.target(batch.clean, batch.noise, batch.times)

    def weights(self, forget: Sequence[float], retain: Sequence[float]) -> tuple[float, float]:
        rising = not forget or forget[-1] <= self.options.most
        return -self.config.forget_weight if rising else 0.0, self.config.retain_weight


def unread(config: Config) -> dict[str, str]:
    why = "the method gradient-ascent has no forget loss that is to fall, and pauses by its option most"
    return dict.fromkeys(("overwrite.dual_rate", "overwrite.dual_bound"), why)


GRADIENT_ASCENT = Method(
    name="gradient-ascent",
    summary="Trains the denoising loss of the concept up and that of everything else down.",
    source="the usual baseline",
    settings={
        **AS_THE_MODEL_DRAWS,
        "locate__granularity": "none",
        "overwrite__forget_weight": 1.0,
        "overwrite__retain_weight": 2.0,
        "overwrite__learning_rate": 1e-3,
        "overwrite__steps": 200,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
    },
    denoises=("forget", "retain"),
    options=Options,
    objective=Ascent,
    unread=unread,
)
