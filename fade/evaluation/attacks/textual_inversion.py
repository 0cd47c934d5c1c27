"""Textual inversion: the embeddings of one to five new words are trained on pictures of the concept until the adapted
model, asked with them in the concept's place ("a photo of S₁ … S_k"), denoises the pictures:

    v* = argmin_v E‖f(z_t, t, c(v)) − y‖²     (Gal et al., arXiv 2208.01618, equation 2)

with every weight frozen. Against erased models: Pham et al., "Circumventing concept erasure methods", arXiv 2308.01508.
Who attacks needs gradients through denoiser and text encoders; the words that are found are a small file that anybody
loads into an ordinary pipeline. Where a pipeline reads with several text encoders, each gets embeddings of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fade.adapter import gradients_as_found
from fade.evaluation.attacks.denoising import denoising_loss, descend
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.words import Encoder, Words, encoded, named_by_placeholders, words_of
from fade.modes import evaluation_mode, out_of_inference_mode
from fade.noise import epoch_order, step_generator
from fade.progress import progress_bar


@dataclass(frozen=True)
class TextualInversion:
    name: ClassVar[str] = "textual-inversion"
    needs: ClassVar[str] = "the adapted model's weights and pictures of the concept; then an embedding file"

    vectors: int = 1
    """New words, k."""
    iterations: int = 150
    pictures: int = 16
    batch_size: int = 8
    learning_rate: float = 0.05
    """Adam's, in units of the root mean square of the text encoder's embeddings."""

    def setting(self, subject: Subject) -> str:
        words = f"{self.vectors} vector{'s' if self.vectors > 1 else ''}"
        return f"{words}, {self.iterations} iterations on {self.pictures} pictures"

    def __call__(self, subject: Subject) -> Drawn:
        words = words_of(subject)
        captions = named_by_placeholders(subject, words, subject.example_prompts(self.pictures), self.vectors)
        prompts = named_by_placeholders(subject, words, subject.prompts, self.vectors)
        vectors, losses = self.optimise(subject, words, subject.examples(self.pictures), captions)
        with torch.no_grad():
            conditioning = encoded(subject, words, prompts, vectors)
        drawn = subject.sample(conditioning, subject.seeds, "drawing with the new words")
        return Drawn(subject.decode(drawn), losses)

    def optimise(
        self, subject: Subject, words: Words, latents: Tensor, captions: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The embeddings [1, k, width] by text encoder, float32, and the mean loss of the first and last tenth of the
        iterations. Begins from the concept's own tokens. Raises FadeError where a gradient is not finite."""
        backbone = subject.backbone
        vectors = {name: self._begin(subject, encoder) for name, encoder in words.encoders.items()}
        groups = []
        for name, vector in vectors.items():
            unit = words.encoders[name].embeddings().float().square().mean().sqrt().item()
            groups.append({"params": [vector], "lr": self.learning_rate * unit})
        optimizer = torch.optim.Adam(groups)
        free, count = list(vectors.values()), self.batch_size * latents[0].numel()
        losses = []
        out_of_inference_mode(backbone.denoiser)
        with gradients_as_found(backbone.denoiser), evaluation_mode(backbone.denoiser):
            backbone.denoiser.requires_grad_(False)
            with progress_bar("training new words", self.iterations, subject.progress) as advance:
                for number in range(self.iterations):
                    rows = epoch_order(subject.seed, self.name, len(latents), number, self.batch_size)
                    generator = step_generator(subject.seed, self.name, number)
                    conditioning = encoded(subject, words, [captions[row] for row in rows.tolist()], vectors)
                    loss = denoising_loss(backbone, latents[rows], conditioning, generator)
                    losses.append(descend(loss, free, optimizer, backbone, count, "textual inversion"))
                    advance(f"loss {losses[-1]:.2e}")
        tenth = max(1, len(losses) // 10)
        told = {"loss_first": losses[:tenth], "loss_last": losses[-tenth:]} if losses else {}
        return (
            {name: vector.detach() for name, vector in vectors.items()},
            {name: sum(values) / tenth for name, values in told.items()},
        )

    def _begin(self, subject: Subject, encoder: Encoder) -> Tensor:
        """The mean of the concept's tokens, once for each new word."""
        tokens = encoder.tokenizer(subject.forget, add_special_tokens=False)["input_ids"]
        mean = encoder.of_tokens(torch.tensor(tokens)).float().mean(0)
        return mean.expand(1, self.vectors, -1).clone().requires_grad_(True)


VARIANTS = (TextualInversion(1), TextualInversion(5))
