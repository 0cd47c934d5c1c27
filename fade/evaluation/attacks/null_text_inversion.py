"""Null-text inversion, after TINA (text-free inversion attack): a picture of the concept is turned into noise by the
inverse of deterministic drawing (DDIM, or Euler's method for flow matching) with the empty prompt under the adapted
model, and drawn from that noise again with the empty prompt.

No word is used, so an edit of what prompts mean cannot stand in its way: it asks whether the model can still draw the
concept. A step of drawing is z = α z' + β f(z'), f the denoiser's answer at the noisier level, and its inverse asks for
z' = (z − β f(z')) / α. Plain inversion (DDIM's) asks f at z instead, as if the answer did not change within a step.
TINA solves the equation at every step, with 25 steps of AdamW; here it is solved by fixed-point iteration, z'_{i+1} =
(z − β f(z'_i)) / α from the plain inversion's z' (Meiri et al., "Fixed-point inversion for text-to-image diffusion
models", arXiv 2312.12540), which converges in a few passes and needs no gradients. The pictures are the base model's
latents themselves, without the loss of an image decoded and encoded again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fade.evaluation.attacks.settings import Count
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.trajectory import ask, levels
from fade.progress import progress_bar


@dataclass(frozen=True)
class NullTextInversion:
    name: ClassVar[str] = "null-text-inversion"
    needs: ClassVar[str] = "the adapted model and pictures of the concept"

    steps: Count = 50
    """Of the inversion, and of drawing from what it gives."""
    iterations: Count = 1
    """Of the fixed point, in each step of the inversion; 1 is plain inversion."""

    def setting(self, subject: Subject) -> str:
        return f"{self.steps} steps" + (f", {self.iterations} iterations each" if self.iterations > 1 else "")

    def __call__(self, subject: Subject) -> Drawn:
        pictures = subject.concept_latents
        latents = subject.backbone.ode(
            self.inverted(subject, pictures), subject.empty_prompt, self.steps, batch_size=subject.batch_size,
            progress=subject.progress, description="drawing from the inverse",
        )  # fmt: skip
        away = (latents - pictures).square().mean().sqrt().item()
        return Drawn(subject.decode(latents), {"rms_from_pictures": away})

    @torch.no_grad()
    def inverted(self, subject: Subject, latents: Tensor) -> Tensor:
        """Noise [n, C, h, w], float32, from which drawing leads to the latents."""
        backbone, path = subject.backbone, levels(subject.backbone, self.steps, latents.shape)
        chunks = latents.to(backbone.device, torch.float32).split(subject.batch_size)
        parts = []
        with progress_bar("inverting pictures", len(chunks) * self.steps, subject.progress) as advance:
            for chunk in chunks:
                prompts = subject.empty_prompt.repeat(len(chunk))
                for high, low in zip(path[-2::-1], path[:0:-1], strict=True):
                    keep, lead = high.step_to(low)
                    noisier = high.noised(*low.estimates(chunk, ask(backbone, chunk, high, prompts)))
                    for _ in range(self.iterations - 1):
                        noisier = (chunk - lead * ask(backbone, noisier, high, prompts)) / keep
                    chunk = noisier
                    advance()
                parts.append(chunk)
        return torch.cat(parts)


VARIANTS = (NullTextInversion(), NullTextInversion(25, iterations=4))
