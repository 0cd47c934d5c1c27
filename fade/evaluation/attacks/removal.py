"""Removal: the adapter is merged into the weights, taken out of them again and switched off, and the model is what it
was.

Exact by design (every base weight has its bits back), so this brings everything back whenever the model is handed out
with the adapter beside it, or merged together with the adapter's file. It is here so that nobody reads the other rows
as if it were not: against people who hold the weights, hand out merged weights and keep the file. Whether it was exact
is told: by the pictures that are drawn anew, and by the weights that the adapter was merged into.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fade.errors import FadeError
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.weights import edited_layers
from fade.quantised import is_ordinary


@dataclass(frozen=True)
class Removal:
    name: ClassVar[str] = "removal"
    needs: ClassVar[str] = "the base model with the adapter beside it, or merged weights and the adapter's file"

    def setting(self, subject: Subject) -> str:
        return "adapter taken off"

    def __call__(self, subject: Subject) -> Drawn:
        base = subject.decode(subject.concept_latents)
        numbers = self.take_out(subject)
        with subject.adapter.disabled():
            images = subject.decode(subject.sample(subject.prompts, subject.seeds, "drawing without the adapter"))
        numbers["pictures_equal_base"] = same = torch.equal(images, base)
        return Drawn(images, numbers, f"pictures {'are' if same else 'are not'} the base model's bit for bit")

    def take_out(self, subject: Subject) -> dict[str, Any]:
        """Merges the adapter and takes it out again; how it went, ready for JSON. Where merging is refused it is only
        switched off, and why is told."""
        subject.note_model()
        layers = edited_layers(subject)
        before = {name: layer.weight.detach().clone() for name, layer in layers.items() if is_ordinary(layer)}
        try:
            subject.adapter.merge()
        except FadeError as refused:
            return {"taken_off_by": "disable", "not_merged": str(refused)}
        subject.adapter.unmerge()
        same = all(torch.equal(layers[name].weight, weight) for name, weight in before.items())
        return {"taken_off_by": "unmerge", "weights_equal_base": same}


VARIANTS = (Removal(),)
