"""Inpainting: half of a picture of the concept is hidden, and the adapted model draws it again with the forget prompt.

At every level the half that is known is put back, noised to that level (blended latent diffusion, Avrahami et al.,
arXiv 2206.02779; RePaint, Lugmayr et al., arXiv 2201.09865, without going back and forth). The lower or the right half
is hidden. A half may be enough for the judge whatever is drawn beside it, so the base model's count is told beside.
Needs a picture and any program that inpaints.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.trajectory import Level, Move, levels, start_noise, walk


@dataclass(frozen=True)
class Inpainting:
    name: ClassVar[str] = "inpainting"
    needs: ClassVar[str] = "the adapted model, pictures of the concept and the forget prompt"

    hidden: Literal["lower", "right"]

    def setting(self, subject: Subject) -> str:
        return f"{self.hidden} half hidden"

    def __call__(self, subject: Subject) -> Drawn:
        pictures = subject.concept_latents.float()
        noise, mask = start_noise(subject, pictures), self.mask(pictures)
        prompts = subject.backbone.encode_prompts(list(subject.prompts))
        start = levels(subject.backbone, subject.steps, pictures.shape)[0].noised(torch.where(mask, 0, pictures), noise)

        def move(rows: slice) -> Move:
            def blended(number: int, latents: Tensor, answer: Tensor, now: Level, then: Level) -> Tensor:
                known = then.noised(pictures[rows], noise[rows])
                return torch.where(mask, then.noised(latents, answer), known)

            return blended

        def drawn(description: str) -> Tensor:
            return walk(subject, start, prompts, move, subject.steps, description=description)

        base = subject.count(
            subject.of_base(
                self.name,
                {**asdict(self), "prompts": subject.prompts, "seeds": subject.seeds},
                lambda: {"latents": drawn("inpainting with the base model")},
            )["latents"]
        )
        return Drawn(
            subject.decode(drawn("inpainting")), {"base_recognised": base}, f"base model {base} of {len(pictures)}"
        )

    def mask(self, latents: Tensor) -> Tensor:
        """bool [1, 1, h, w] for latents [n, C, h, w]: what is hidden."""
        height, width = latents.shape[2:]
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool, device=latents.device)
        half = mask[..., height // 2 :, :] if self.hidden == "lower" else mask[..., width // 2 :]
        half.fill_(True)
        return mask


VARIANTS = (Inpainting("lower"), Inpainting("right"))
