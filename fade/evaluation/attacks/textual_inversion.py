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
from fade.evaluation.attacks.settings import Count, Rate, Steps
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.words import Encoder, Words, encoded, named_by_placeholders, words_of
from fade.modes import evaluation_mode, out_of_inference_mode
from fade.noise import epoch_order, step_generator
from fade.progress import progress_bar

_PROBES = 4
"""Batches on which the loss is told before and after."""


@dataclass(frozen=True)
class TextualInversion:
    name: ClassVar[str] = "textual-inversion"
    needs: ClassVar[str] = "the adapted model's weights and pictures of the concept; then an embedding file"

    vectors: Count = 1
    """New words, k."""
    iterations: Steps = 100
    pictures: Count = 16
    batch_size: Count = 8
    learning_rate: Rate = 0.2
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
        """The embeddings [1, k, width] by text encoder, float32, and the mean loss before and after, on noise that is
        in no iteration. Begins from the concept's own tokens. Raises FadeError where a gradient is not finite."""
        backbone = subject.backbone
        vectors = {name: self._begin(subject, encoder) for name, encoder in words.encoders.items()}
        groups = []
        for name, vector in vectors.items():
            unit = words.encoders[name].embeddings().float().square().mean().sqrt().item()
            groups.append({"params": [vector], "lr": self.learning_rate * unit})
        optimizer = torch.optim.Adam(groups)
        free, count = list(vectors.values()), self.batch_size * latents[0].numel()

        def loss(number: int, stream: str) -> Tensor:
            rows = epoch_order(subject.seed, stream, len(latents), number, self.batch_size)
            conditioning = encoded(subject, words, [captions[row] for row in rows.tolist()], vectors)
            return denoising_loss(backbone, latents[rows], conditioning, step_generator(subject.seed, stream, number))

        @torch.no_grad()
        def told() -> float:
            return sum(loss(probe, f"{self.name} probes").item() for probe in range(_PROBES)) / _PROBES

        out_of_inference_mode(backbone.denoiser)
        with gradients_as_found(backbone.denoiser), evaluation_mode(backbone.denoiser):
            backbone.denoiser.requires_grad_(False)
            before = told()
            with progress_bar("training new words", self.iterations, subject.progress) as advance:
                for number in range(self.iterations):
                    value = descend(loss(number, self.name), free, optimizer, backbone, count, "textual inversion")
                    advance(f"loss {value:.2e}")
            after = told()
        found = {name: vector.detach() for name, vector in vectors.items()}
        return found, {"loss_before": before, "loss_after": after}

    def _begin(self, subject: Subject, encoder: Encoder) -> Tensor:
        """The mean of the concept's tokens, once for each new word."""
        tokens = encoder.tokenizer(subject.forget, add_special_tokens=False)["input_ids"]
        mean = encoder.of_tokens(torch.tensor(tokens)).float().mean(0)
        return mean.expand(1, self.vectors, -1).clone().requires_grad_(True)


VARIANTS = (TextualInversion(1), TextualInversion(5))
