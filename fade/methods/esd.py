"""ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345): train the concept to what guidance leads to away from it.

    target = ε_θ(z_t, ∅) − η (ε_θ(z_t, c) − ε_θ(z_t, ∅)),   L = ‖ε_{θ+Δ}(z_t, c) − target‖²

with θ frozen. ESD-x changes cross-attention, for concepts that are named; ESD-u everything else, for those that show
without their name. Nothing holds what is to be retained: its loss has the weight 0 and is only recorded (`drift`).
Ours: factors of a low rank instead of whole weights; z_t are pictures that the frozen model drew of the concept,
noised to t, and not its sampler's states on the way to t; the learning rate (1e-5 to 5e-5 for whole weights).
"""

from dataclasses import dataclass

from torch import Tensor

from fade.errors import FadeError
from fade.methods.attention import beside_cross_attention, cross_attention
from fade.methods.base import Method
from fade.objective import Batch, Objective, Training


@dataclass(frozen=True)
class Options:
    """ESD's own settings."""

    guidance: float = 1.0
    """η, how far away from the concept."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < 1e3:
            raise FadeError(f"options.guidance must be in [0, 1000), not {self.guidance}")


class NegativeGuidance(Objective):
    """What ESD trains on."""

    losses = ("erase", "drift")

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.empty = self.backbone.negative()

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(batch, self.away, self.frozen(batch.noised, batch.times, batch.asked))

    def away(self, half: Batch) -> Tensor:
        """The forget half's targets."""
        concept = self.frozen(half.noised, half.times, half.asked)
        empty = self.frozen(half.noised, half.times, self.empty.repeat(len(half.noised)))
        return empty - self.options.guidance * (concept - empty)


DENSE = {
    "locate__granularity": "none",
    "overwrite__retain_weight": 0.0,
    "overwrite__forget_weight": 1.0,
    "overwrite__retain_batch_size": 1,
    "overwrite__learning_rate": 3e-4,
    "overwrite__steps": 100,
    "overwrite__stop_forget": 0.0,
}
"""All weights of the layers, without a retain loss: what is retained is held by nothing but few and small steps. Of
DigitCanvas's "three" (80 pictures) esd-x had UA 100, IRA 98.6 and CRA 100; with 200 steps at 1e-3 IRA 62 and CRA 41."""

ESD_X = Method(
    name="esd-x",
    summary="Trains cross-attention so that the concept's prompt is answered as guidance away from it.",
    source="ESD, ICCV 2023, arXiv 2303.07345",
    settings=DENSE,
    options=Options,
    objective=NegativeGuidance,
    targets=cross_attention,
)

ESD_U = Method(
    name="esd-u",
    summary="As esd-x, but trains every layer beside cross-attention, for what shows without being named.",
    source="ESD, ICCV 2023, arXiv 2303.07345",
    settings=DENSE,
    options=Options,
    objective=NegativeGuidance,
    targets=beside_cross_attention,
)
