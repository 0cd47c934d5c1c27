"""LECO (p1atdev, 2023; in kohya's sd-scripts): an erasing LoRA from prompts alone.

Noise is denoised by the model in training, with guidance towards the concept, until a random time t; there

    target = ε_θ(z_t, c_n) − η (ε_θ(z_t, c) − ε_θ(z_t, ∅)),   L = ‖ε_{θ+Δ}(z_t, c) − target‖²

with θ frozen and c_n neutral: the surrogate, or the empty prompt, as in the examples that come with it; what guidance
leads away from is the concept alone (`fade.methods.esd`). It is ESD's loss on states of the sampler. Nothing holds what
is to be retained. Ours: from noise to t it is always `steps` steps of DDIM (Euler's, for flow matching) and not up to
50 of a scheduler's; the learning rate (1e-4 for Stable Diffusion).

Of DigitCanvas's "three" (80 pictures) UA was 100, IRA 79.2 and CRA 100: look-alikes go with the concept, as with ESD.
"""

from dataclasses import dataclass

from torch import Tensor

from fade.config import Config
from fade.errors import FadeError
from fade.methods.base import Method
from fade.methods.esd import DENSE, AwayFrom, check_direction
from fade.noise import split
from fade.objective import Batch


@dataclass(frozen=True)
class Options:
    """LECO's own settings."""

    guidance: float = 1.0
    """η, how far away from the concept."""
    direction: str = "concept"
    """As of ESD: what guidance leads away from, the `concept` alone or each whole `prompt` of it."""
    neutral: str = "surrogate"
    """What the target starts from: `empty` or `surrogate`."""
    steps: int = 5
    """Denoising steps from noise to t."""
    drawing_guidance: float = 3.0
    """Classifier-free guidance of these steps."""

    def __post_init__(self) -> None:
        check_direction(self.direction)
        if not 0 <= self.guidance < 1e3:
            raise FadeError(f"options.guidance must be in [0, 1000), not {self.guidance}")
        if self.neutral not in ("empty", "surrogate"):
            raise FadeError(f"options.neutral must be empty or surrogate, not {self.neutral!r}")
        if not 1 <= self.steps <= 1000:
            raise FadeError(f"options.steps must be from 1 to 1000, not {self.steps}")
        if not abs(self.drawing_guidance) < 1e3:
            raise FadeError(f"options.drawing_guidance must be below 1000, not {self.drawing_guidance}")


class PromptsAlone(AwayFrom):
    """What LECO trains on."""

    moving = True

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor, asked: Tensor, forget: Tensor) -> Tensor:
        noised = super().noised(clean, noise, times, asked, forget)
        if forget.any():
            noised[forget] = self.drawn(noise[forget], times[forget], asked[forget.cpu()])
        return noised

    def drawn(self, noise: Tensor, times: Tensor, asked: Tensor) -> Tensor:
        """Latents on their way from noise to a picture, at times [n]."""
        guidance, steps = self.options.drawing_guidance, self.options.steps
        empty, state = self.empty.repeat(len(noise)), noise
        for step in range(steps):
            start, end = (
                self.backbone.times(self.backbone.time_span + (times.float() - self.backbone.time_span) * done / steps)
                for done in (step, step + 1)
            )
            concept = self.current(state, start, asked).float()
            without = self.current(state, start, empty).float()
            predicted = without + guidance * (concept - without)
            state = self.backbone.add_noise(*split(self.backbone, state.float(), start, predicted), end).to(noise)
        return state

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(batch, self.away, self.frozen(batch.noised, batch.times, batch.asked))

    def away(self, half: Batch) -> Tensor:
        """The forget half's targets."""
        neutral = half.answers if self.options.neutral == "surrogate" else self.empty.repeat(len(half.noised))
        return self.frozen(half.noised, half.times, neutral) - self.options.guidance * self.apart(half)


def unread(config: Config) -> dict[str, str]:
    if config.measures or config.overwrite.timesteps == "targeted":
        return {}
    why = "the method leco draws its forget half from noise. Leave it out, or choose esd-x, which takes pictures"
    return dict.fromkeys(("data.forget_images", "data.forget_from"), why)


LECO = Method(
    name="leco",
    summary="Trains a LoRA from prompts alone, on noise that the model in training denoises part of the way.",
    source="LECO, github.com/p1atdev/LECO",
    settings={**DENSE, "overwrite__pool": 0},
    options=Options,
    objective=PromptsAlone,
    unread=unread,
)
