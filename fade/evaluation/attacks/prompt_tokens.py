"""Prompt tokens, after UnlearnDiffAtk (Zhang et al., "To generate or not? Safety-driven unlearned diffusion models are
still easy to generate unsafe images", arXiv 2310.11868): k words before each forget prompt are searched with gradients,
so that the adapted model denoises a picture of the concept,

    min_δ E‖f(z_t, t, c(δ ‖ prompt)) − y‖²,     δ one-hot in the vocabulary at each of the k places.

δ is relaxed to S, a point of the simplex at each place. An iteration asks with the one-hot of S's largest entries,
passes the gradient straight through to S, takes a step of Adam (learning rate 0.01, weight decay 0.1) and projects S
onto the simplex again (Duchi et al., 2008); 40 iterations. Projection, optimiser and budget are the paper's; that the
forward pass asks with the one-hot itself, and that S begins at a random point of the simplex, is our reconstruction.
Each prompt has its own words, all are searched in one batch, and each picture is drawn from its prompt with what was
found before it.

Words may also spoil a prompt; so what the base model draws under the same prompts is told beside.

Who attacks needs gradients through the model while searching; the text then works for everybody.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fade.adapter import gradients_as_found
from fade.evaluation.attacks.denoising import denoising_loss, descend
from fade.evaluation.attacks.settings import Amount, Count, Rate, Steps
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.words import Words, encoded, words_of
from fade.modes import evaluation_mode, out_of_inference_mode
from fade.noise import step_generator
from fade.progress import progress_bar


@dataclass(frozen=True)
class PromptTokens:
    name: ClassVar[str] = "prompt-tokens"
    needs: ClassVar[str] = "the adapted model's weights and a picture of the concept to search; then a prompt"

    tokens: Count = 3
    """Words before a prompt, k."""
    iterations: Steps = 40
    learning_rate: Rate = 0.01
    weight_decay: Amount = 0.1
    draws: Count = 2
    """Noised copies of a prompt's picture in each iteration."""

    def setting(self, subject: Subject) -> str:
        return f"{self.tokens} tokens before the prompt, {self.iterations} iterations"

    def __call__(self, subject: Subject) -> Drawn:
        words = words_of(subject)
        prompts = tuple(dict.fromkeys(subject.prompts))
        found = self.search(subject, words, prompts, subject.examples(len(prompts)))
        texts = {
            prompt: " ".join([*(words.texts[word] for word in chosen), prompt])
            for prompt, chosen in zip(prompts, found.tolist(), strict=True)
        }
        asked = tuple(texts[prompt] for prompt in subject.prompts)
        numbers, told = subject.counted_under(asked)
        drawn = subject.decode(subject.sample(asked, subject.seeds, "drawing"))
        return Drawn(drawn, {"prompts": list(texts.values()), **numbers}, told)

    def search(self, subject: Subject, words: Words, prompts: tuple[str, ...], latents: Tensor) -> Tensor:
        """The words before each of n prompts as indices into `words.texts`, int64 [n, k], for latents [n, C, h, w] of
        the concept. Raises FadeError where a gradient is not finite."""
        backbone, count = subject.backbone, len(words.texts)
        tables = {name: encoder.embeddings().float() for name, encoder in words.encoders.items()}
        generator = step_generator(subject.seed, self.name, 0)
        start = torch.empty(len(prompts), self.tokens, count).exponential_(generator=generator)
        relaxed = (start / start.sum(-1, keepdim=True)).to(latents.device).requires_grad_(True)
        optimizer = torch.optim.AdamW([relaxed], lr=self.learning_rate, weight_decay=self.weight_decay)
        texts = [f"{words.placeholders(self.tokens)} {prompt}" for prompt in prompts]
        clean = latents.repeat_interleave(self.draws, 0)
        rows = torch.arange(len(prompts)).repeat_interleave(self.draws)
        out_of_inference_mode(backbone.denoiser)
        with gradients_as_found(backbone.denoiser), evaluation_mode(backbone.denoiser):
            backbone.denoiser.requires_grad_(False)
            with progress_bar("searching prompts", self.iterations, subject.progress) as advance:
                for number in range(self.iterations):
                    chosen = straight_through(relaxed)
                    embeddings = {name: chosen @ table.to(chosen.device) for name, table in tables.items()}
                    conditioning = encoded(subject, words, texts, embeddings)
                    generator = step_generator(subject.seed, self.name, number + 1)
                    loss = denoising_loss(backbone, clean, conditioning.rows(rows), generator)
                    told = descend(loss, [relaxed], optimizer, backbone, clean.numel(), "the prompt search")
                    with torch.no_grad():
                        relaxed.copy_(onto_simplex(relaxed))
                    advance(f"loss {told:.2e}")
        return relaxed.detach().argmax(-1).cpu()


def straight_through(relaxed: Tensor) -> Tensor:
    """The one-hot of the largest entry of each last dimension, with the gradient of `relaxed` itself."""
    hard = F.one_hot(relaxed.argmax(-1), relaxed.shape[-1]).to(relaxed)
    return hard + relaxed - relaxed.detach()


def onto_simplex(points: Tensor) -> Tensor:
    """The nearest points with no negative entry and a sum of 1 in each last dimension (Duchi et al., "Efficient
    projections onto the l1-ball", ICML 2008, figure 1)."""
    descending = points.sort(-1, descending=True).values
    excess = (descending.cumsum(-1) - 1) / torch.arange(1, points.shape[-1] + 1, device=points.device)
    last = (descending > excess).sum(-1, keepdim=True) - 1
    return (points - excess.gather(-1, last)).clamp(min=0)


VARIANTS = (PromptTokens(),)
