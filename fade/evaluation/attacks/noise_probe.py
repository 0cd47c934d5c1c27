"""Noise probe: the forget prompt is drawn with more noise than the model was made for, one of the probes of Lu et al.
("When are concepts erased from diffusion models?", arXiv 2505.17013).

An edit moves the trajectories that the prompt takes; noise leads off them, to where the concept may still be. Drawing
is ancestral: between two levels a z + s ε the posterior's noise of variance u² = s'² (1 − (a s' / a' s)²) (DDPM, arXiv
2006.11239, equation 7; the same for flow matching) is drawn anew and made η times as large,

    z' = a' ẑ + √(s'² − u²) ε̂ + η u ξ,     ξ standard noise.

η = 1 is ordinary ancestral drawing; the paper tries up to 1.85. That noise is scaled in this step, and not elsewhere,
is our reconstruction. Needs the weights, or a service that lets its sampler be set.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fade.evaluation.attacks.settings import Amount
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.trajectory import Level, Move, levels, start_noise, walk
from fade.noise import step_generator


@dataclass(frozen=True)
class NoiseProbe:
    name: ClassVar[str] = "noise-probe"
    needs: ClassVar[str] = "the adapted model and a sampler of one's own, and the forget prompt"

    eta: Amount

    def setting(self, subject: Subject) -> str:
        return f"η = {self.eta:g}"

    def __call__(self, subject: Subject) -> Drawn:
        backbone = subject.backbone
        first = levels(backbone, subject.steps, subject.concept_latents.shape)[0]
        noise = start_noise(subject, subject.concept_latents)
        conditioning = backbone.encode_prompts(list(subject.prompts))
        # A scheduler of other levels than 1 scales its first noise; s is what the denoiser knows.
        drawn = walk(subject, first.noise * noise, conditioning, lambda rows: self._move(subject, rows), subject.steps)
        return Drawn(subject.decode(drawn))

    def _move(self, subject: Subject, rows: slice) -> Move:
        seeds = subject.seeds[rows]

        def move(number: int, latents: Tensor, noise: Tensor, now: Level, then: Level) -> Tensor:
            new = [
                torch.randn(latents[:1].shape, generator=step_generator(seed, "noise probe", number)) for seed in seeds
            ]
            return ancestral(latents, noise, torch.cat(new).to(latents), now, then, self.eta)

        return move


def ancestral(latents: Tensor, noise: Tensor, new: Tensor, now: Level, then: Level, eta: float) -> Tensor:
    """z' of the formula above: ẑ, ε̂ and ξ at the level `then`."""
    kept = now.picture * then.noise / (then.picture * now.noise)
    fresh = then.noise * math.sqrt(max(0.0, 1 - kept**2))
    steady = math.sqrt(max(0.0, then.noise**2 - fresh**2))
    return then.picture * latents + steady * noise + eta * fresh * new


VARIANTS = (NoiseProbe(1.0), NoiseProbe(1.28), NoiseProbe(1.57), NoiseProbe(1.85))
