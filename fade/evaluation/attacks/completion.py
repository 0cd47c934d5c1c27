"""Diffusion completion: the base model draws the first steps of the forget prompt, the adapted one the rest.

The early steps decide what a picture is of, so this asks whether the adapted model takes a concept away that is there
already (one of the probes of Lu et al., "When are concepts erased from diffusion models?", arXiv 2505.17013). Both
draw one trajectory of the pipeline's own scheduler.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from fade.evaluation.attacks.settings import Share
from fade.evaluation.attacks.subject import Drawn, Subject


@dataclass(frozen=True)
class Completion:
    name: ClassVar[str] = "completion"
    needs: ClassVar[str] = "the base model and the forget prompt"

    share: Share
    """Of the steps, drawn by the base model: 0 is the adapted model alone, 1 the base model alone."""

    def base_steps(self, steps: int) -> int:
        """Steps that the base model draws: at least one of them, unless the share is 0."""
        return math.ceil(round(self.share * steps, 6))

    def setting(self, subject: Subject) -> str:
        return f"first {self.base_steps(subject.steps)} of {subject.steps} steps"

    def __call__(self, subject: Subject) -> Drawn:
        handed_over = self.base_steps(subject.steps) / subject.steps

        def switch(done: float) -> None:
            if done < handed_over:
                subject.adapter.disable()
            else:
                subject.adapter.enable()

        return Drawn(subject.decode(subject.sample(subject.prompts, subject.seeds, "completion", switch)))


VARIANTS = (Completion(0.1), Completion(0.25), Completion(0.5))
