"""What attacks on the image side share: the levels of a trajectory from noise to a picture, and what a denoiser's
answer says of the picture and the noise there.

At a time t a noised picture is z_t = a z + s ε and the denoiser is to answer y = c z + d ε (`Backbone.add_noise` and
`target`), whatever the family: a² + s² = 1 and y = ε, z or the velocity for DDPM, a = 1 − σ, s = σ and y = ε − z for
flow matching. So its answer gives both z and ε, and with them z at any other level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fade.conditioning import Conditioning
from fade.evaluation.attacks.subject import Subject
from fade.progress import progress_bar

if TYPE_CHECKING:
    from fade.backbones import Backbone


@dataclass(frozen=True)
class Level:
    """One time of a trajectory, and its a, s, c and d."""

    time: Tensor
    """[1]."""
    picture: float
    noise: float
    answer_picture: float
    answer_noise: float

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """z_t."""
        return self.picture * latents + self.noise * noise

    def estimates(self, noised: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """z and ε as the denoiser answers: the solution of both equations."""
        both = self.picture * self.answer_noise - self.noise * self.answer_picture
        latents = (self.answer_noise * noised - self.noise * answer) / both
        return latents, (self.picture * answer - self.answer_picture * noised) / both

    def step_to(self, other: Level) -> tuple[float, float]:
        """α and β of the deterministic step from here to another level, α z_t + β y."""
        both = self.picture * self.answer_noise - self.noise * self.answer_picture
        return (
            (other.picture * self.answer_noise - other.noise * self.answer_picture) / both,
            (other.noise * self.picture - other.picture * self.noise) / both,
        )


def levels(backbone: Backbone, steps: int, shape: torch.Size) -> list[Level]:
    """From noise to a picture, steps + 1 of them, for latents of a shape [n, C, h, w]."""
    one, zero = torch.ones(1, *shape[1:]), torch.zeros(1, *shape[1:])
    found = []
    for time in backbone.grid(steps).split(1):
        values = (
            function(*pair, time).flatten()[0].item()
            for function in (backbone.add_noise, backbone.target)
            for pair in ((one, zero), (zero, one))
        )
        found.append(Level(time, *values))
    return found


Move = Callable[[int, Tensor, Tensor, Level, Level], Tensor]
"""(number of the step, z, ε, level now, level then) -> latents at the level then."""


def deterministic(number: int, latents: Tensor, noise: Tensor, now: Level, then: Level) -> Tensor:
    """DDIM without noise; of flow matching, Euler's method."""
    return then.noised(latents, noise)


@torch.no_grad()
def walk(
    subject: Subject,
    noised: Tensor,
    conditioning: Conditioning,
    move: Callable[[slice], Move],
    steps: int,
    first: int = 0,
    description: str = "drawing",
) -> Tensor:
    """Latents [n, C, h, w] drawn from noised ones at level number `first` of a trajectory of so many steps, with the
    subject's guidance and the adapter as it is now. `move` is asked for each batch, by its rows."""
    backbone, path = subject.backbone, levels(subject.backbone, steps, noised.shape)
    guided = subject.guidance_scale > 1 and not backbone.tells_guidance
    negative = backbone.negative() if guided else None
    starts = range(0, len(noised), subject.batch_size)
    parts = []
    with progress_bar(description, len(starts) * (steps - first), subject.progress) as advance:
        for start in starts:
            rows = slice(start, start + subject.batch_size)
            chunk, prompts, step = noised[rows].to(backbone.device, torch.float32), conditioning.rows(rows), move(rows)
            both_prompts = None if negative is None else Conditioning.cat([negative.repeat(len(chunk)), prompts])
            for number in range(first, steps):
                now, then = path[number], path[number + 1]
                if both_prompts is None:
                    answer = ask(backbone, chunk, now, prompts)
                else:  # both in one batch, as pipelines ask
                    both = ask(backbone, chunk.repeat(2, 1, 1, 1), now, both_prompts)
                    without, answer = both.chunk(2)
                    answer = without + subject.guidance_scale * (answer - without)
                chunk = step(number, *now.estimates(chunk, answer), now, then)
                advance()
            parts.append(chunk)
    return torch.cat(parts)


def ask(backbone: Backbone, noised: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """The denoiser's answer at a level, float32."""
    times = level.time.expand(len(noised)).to(noised.device)
    return backbone.predict(noised.to(backbone.dtype), times, conditioning).float()


def start_noise(subject: Subject, like: Tensor) -> Tensor:
    """Standard noise [n, C, h, w] from the seed of each picture, as a pipeline draws it."""
    noise = [torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(seed)) for seed in subject.seeds]
    return torch.cat(noise).to(like.device)
