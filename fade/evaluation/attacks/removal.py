"""Removal: the adapter is taken off, and the model is what it was.

Exact by design (every base weight has its bits back), so this brings everything back whenever the model is handed out
with the adapter beside it, or merged together with the adapter's file, which `unmerge` or a subtraction takes out
again. It is here so that nobody reads the other rows as if it were not: against people who hold the weights, hand out
merged weights and keep the file.
"""

from dataclasses import dataclass
from typing import ClassVar

from fade.evaluation.attacks.subject import Drawn, Subject


@dataclass(frozen=True)
class Removal:
    name: ClassVar[str] = "removal"
    needs: ClassVar[str] = "the base model with the adapter beside it, or merged weights and the adapter's file"

    def setting(self, subject: Subject) -> str:
        return "adapter taken off"

    def __call__(self, subject: Subject) -> Drawn:
        return Drawn(subject.decode(subject.concept_latents))


VARIANTS = (Removal(),)
