"""ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345): train the concept to what guidance leads to away from it.

    target = ε_θ(z_t, p) − (1 + η) (ε_θ(z_t, c) − ε_θ(z_t, ∅)),   L = ‖ε_{θ+Δ}(z_t, p) − target‖²

with θ frozen, p a prompt of the concept and c the concept alone. Where p is c it is the paper's ε(∅) − η (ε(c) − ε(∅)),
for other p what the authors' code trains with `erase_from` p. With `direction="prompt"` c is p, and a prompt that says
more than the concept is led away from all of it: of DigitCanvas's captions of "neon" digits went, and neon stayed.
ESD-x changes cross-attention, for concepts that are named; ESD-u everything else, for those that show without their
name. Nothing holds what is to be retained: its loss has the weight 0 and is only recorded (`drift`).
Ours: factors of a low rank instead of whole weights; z_t are pictures that the frozen model drew of the concept,
noised to t, and not its sampler's states on the way to t; the learning rate (1e-5 to 5e-5 for whole weights).

On DigitCanvas (80 pictures) ESD-x had of "three" UA 100, IRA 83.3 and CRA 100, of "neon" 80, 98.6 and 98.8; ESD-u of
"three" 100, 91.7 and 100, of "neon" 0, 95.7 and 100: it is not for styles. What is lost are the look-alikes; at half of
ESD-x's learning rate, led away from whole prompts, UA was 62 and IRA 86.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.bundled import recognised
from fade.concept import Pair, mentions, pairs_in
from fade.errors import FadeError
from fade.methods.attention import beside_cross_attention, cross_attention
from fade.methods.base import Method
from fade.objective import Batch, Objective, Training


def check_direction(direction: str) -> None:
    """Raises FadeError for an option `direction` that is none."""
    if direction not in ("concept", "prompt"):
        raise FadeError(f"options.direction must be concept or prompt, not {direction!r}")


@dataclass(frozen=True)
class Options:
    """ESD's own settings."""

    guidance: float = 1.0
    """η, how far away from the concept."""
    direction: str = "concept"
    """What guidance leads away from: the `concept` alone, or each whole `prompt` of it."""

    def __post_init__(self) -> None:
        check_direction(self.direction)
        if not 0 <= self.guidance < 1e3:
            raise FadeError(f"options.guidance must be in [0, 1000), not {self.guidance}")


def asked_in(text: str, pairs: Sequence[Pair]) -> int:
    """Which of the concepts a prompt asks for: the one whose prompt it is; of captions that people wrote, the longest
    that it names, so that "hot dog" is no "dog"; else the first."""
    own = next((i for i, pair in enumerate(pairs) if text in pair.forget_prompts), None)
    if own is not None:
        return own
    named = [i for i, pair in enumerate(pairs) if mentions(text, pair.forget)]
    return max(named, key=lambda i: len(pairs[i].forget), default=0)


class AwayFrom(Objective):
    """What leads away from a concept, of methods whose `options` have a `direction`."""

    losses = ("erase", "drift")

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.empty, bundled = self.backbone.negative(), recognised(self.backbone.pipeline)
        pairs = pairs_in(training.adapter.metadata["concept"])
        words = [pair.forget if bundled is None else bundled.alone(pair.forget) for pair in pairs]
        self._concepts = self.backbone.encode_prompts(words)
        self._named = torch.tensor([asked_in(text, pairs) for text in training.prompts.prompts])

    def apart(self, half: Batch) -> Tensor:
        """ε(z_t, c) − ε(z_t, ∅) of the frozen model, for the forget half."""
        concept = half.asked if self.options.direction == "prompt" else self._concepts.rows(self._named[half.asked])
        empty = self.empty.repeat(len(half.noised))
        return self.frozen(half.noised, half.times, concept) - self.frozen(half.noised, half.times, empty)


class NegativeGuidance(AwayFrom):
    """What ESD trains on."""

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(batch, self.away, self.frozen(batch.noised, batch.times, batch.asked))

    def away(self, half: Batch) -> Tensor:
        """The forget half's targets."""
        asked = self.frozen(half.noised, half.times, half.asked)
        return asked - (1 + self.options.guidance) * self.apart(half)


DENSE = {
    "locate__granularity": "none",
    "overwrite__retain_weight": 0.0,
    "overwrite__forget_weight": 1.0,
    "overwrite__retain_batch_size": 1,
    "overwrite__learning_rate": 1e-3,
    "overwrite__steps": 100,
    "overwrite__stop_forget": 0.0,
}
"""All weights of the layers, without a retain loss: what is retained is held by nothing but few and small steps."""

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
    settings={**DENSE, "overwrite__learning_rate": 8e-4},
    options=Options,
    objective=NegativeGuidance,
    targets=beside_cross_attention,
)
