"""Null-text inversion, after TINA (text-free inversion attack): a picture of the concept is turned into noise by the
inverse of deterministic drawing (DDIM, or Euler's method for flow matching) with the empty prompt under the adapted
model, and drawn from that noise again with the empty prompt.

No word is used, so an edit of what prompts mean cannot stand in its way: it asks whether the model can still draw the
concept. The inversion is the plain one; TINA refines each of its steps by a fixed-point iteration, which makes it no
weaker. The pictures are the base model's latents themselves, without the loss of an image decoded and encoded again.
"""

from dataclasses import dataclass
from typing import ClassVar

from fade.evaluation.attacks.subject import Drawn, Subject


@dataclass(frozen=True)
class NullTextInversion:
    name: ClassVar[str] = "null-text-inversion"
    needs: ClassVar[str] = "the adapted model and pictures of the concept"

    steps: int = 50
    """Of the inversion, and of drawing from what it gives."""

    def setting(self, subject: Subject) -> str:
        return f"{self.steps} steps"

    def __call__(self, subject: Subject) -> Drawn:
        latents = subject.concept_latents
        for invert, description in ((True, "inverting pictures"), (False, "drawing from the inverse")):
            latents = subject.backbone.ode(
                latents, subject.empty_prompt, self.steps, invert=invert, batch_size=subject.batch_size,
                progress=subject.progress, description=description,
            )  # fmt: skip
        return Drawn(subject.decode(latents))


VARIANTS = (NullTextInversion(),)
