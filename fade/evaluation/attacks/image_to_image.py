"""Image to image: a picture of the concept is noised part of the way and drawn from there with the forget prompt by the
adapted model (SDEdit, Meng et al., arXiv 2108.01073).

The strength is the share of the steps that is drawn: at 1 the picture is forgotten, at little strength it comes through
whatever the model is. So the base model's count from the same noised pictures is told beside. Needs a picture and any
program that draws image to image.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor

from fade.evaluation.attacks.settings import Share
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.trajectory import deterministic, levels, start_noise, walk


@dataclass(frozen=True)
class ImageToImage:
    name: ClassVar[str] = "image-to-image"
    needs: ClassVar[str] = "the adapted model, pictures of the concept and the forget prompt"

    strength: Share

    def setting(self, subject: Subject) -> str:
        return f"strength {self.strength:g}"

    def __call__(self, subject: Subject) -> Drawn:
        pictures = subject.concept_latents.float()
        first = round((1 - self.strength) * subject.steps)
        level = levels(subject.backbone, subject.steps, pictures.shape)[first]
        noised = level.noised(pictures, start_noise(subject, pictures))
        prompts = subject.backbone.encode_prompts(list(subject.prompts))

        def drawn(description: str) -> Tensor:
            return walk(subject, noised, prompts, lambda rows: deterministic, subject.steps, first, description)

        base = subject.count(
            subject.of_base(
                self.name,
                {**asdict(self), "prompts": subject.prompts, "seeds": subject.seeds},
                lambda: {"latents": drawn("drawing on with the base model")},
            )["latents"]
        )
        return Drawn(
            subject.decode(drawn("drawing on")), {"base_recognised": base}, f"base model {base} of {len(pictures)}"
        )


VARIANTS = (ImageToImage(0.6), ImageToImage(0.8))
