"""Benign fine-tuning: the edited model is trained on, with pictures of what it was to keep, as anybody trains a model
on what they want it to draw; afterwards it is asked for the concept.

Nobody attacks here. Edits are known to wear off in such training (Suriyakumar et al., "Unstable unlearning: the hidden
risk of concept resurgence in diffusion models", arXiv 2410.08074). The loss, the layers and the optimiser are those of
`relearning`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fade.evaluation.attacks.settings import Count, Rate, Steps
from fade.evaluation.attacks.subject import CannotAttackError, Drawn, Subject
from fade.evaluation.attacks.weights import edited_layers, fine_tuned, open_weights
from fade.noise import step_generator


@dataclass(frozen=True)
class BenignTuning:
    name: ClassVar[str] = "benign-fine-tuning"
    needs: ClassVar[str] = "the weights, and any pictures to train on"

    steps: Steps = 100
    pictures: Count = 24
    """Of retained prompts, chosen at random."""
    batch_size: Count = 8
    learning_rate: Rate = 0.01
    """Adam's, in units of a weight's root mean square."""

    def setting(self, subject: Subject) -> str:
        return f"{self.steps} steps on {self.pictures} retained pictures"

    def __call__(self, subject: Subject) -> Drawn:
        if not subject.retained:
            raise CannotAttackError(
                "the adapter's file names no retained prompts, so nothing benign is there to train on"
            )
        order = step_generator(subject.seed, "retained prompts", 0)
        chosen = torch.randperm(len(subject.retained), generator=order).tolist()
        prompts = tuple(subject.retained[chosen[i % len(chosen)]] for i in range(self.pictures))
        latents = subject.drawn_by_base(prompts)
        with open_weights(subject, edited_layers(subject)) as weights:
            for _ in fine_tuned(
                subject, weights, latents, prompts, (self.steps,), batch_size=self.batch_size,
                learning_rate=self.learning_rate, description="benign fine-tuning",
            ):  # fmt: skip
                drawn = subject.sample(subject.prompts, subject.seeds, "drawing after fine-tuning")
        return Drawn(subject.decode(drawn))


VARIANTS = (BenignTuning(),)
