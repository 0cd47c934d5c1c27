"""SalUn (Fan et al., ICLR 2024, arXiv 2310.12508): train the weights with the largest summed gradient on another label.

Located are the top `keep` of |Σ_b ∂/∂W ‖(1 + g) ε_θ(z_t, c) − g ε_θ(z_t, ∅) − ε‖²| on the forget set, over all layers
together (saliency `guided`). Trained is, on the masked weights themselves,

    L = ‖ε_θ'(z_t, c) − sg ε_θ'(z_t, c')‖² + α ‖ε_θ'(z_t^r, c_r) − ε‖²,

with θ' the model in training: the target moves with it. c' is the other concept: the surrogate, as in the authors'
class-wise scripts, or a random prompt of the retain set (`answer="random"`, the random labels of its classifiers).
Since the correction of 28 February 2026 the authors' code keeps weights outside the mask, and their momentum, where
they were; here they are no parameters at all. α is that of UnlearnCanvas. Ours: the learning rate, which for Stable
Diffusion is 1e-5; the layers are the attention's and not all of them; both predictions see one latent of a picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fade.errors import FadeError
from fade.methods.base import AS_THE_MODEL_DRAWS, Method
from fade.objective import Batch, Objective


@dataclass(frozen=True)
class Options:
    """SalUn's own settings."""

    answer: str = "surrogate"
    """The concept that the forget prompts are trained to be: `surrogate`, or `random` ones of the retain prompts."""

    def __post_init__(self) -> None:
        if self.answer not in ("surrogate", "random"):
            raise FadeError(f"options.answer must be surrogate or random, not {self.answer!r}")


class RandomLabel(Objective):
    """What SalUn trains on."""

    moving = True

    def answers(self, answers: Tensor, forget: int, generator: torch.Generator) -> Tensor:
        if self.options.answer == "surrogate":
            return answers
        retained = self.training.prompts.rows(self.training.latents.retain_prompts)
        drawn = retained[torch.randint(len(retained), (forget,), generator=generator)]
        return torch.cat([drawn, answers[forget:]])

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(
            batch,
            lambda half: self.current(half.noised, half.times, half.answers),
            self.backbone.target(batch.clean, batch.noise, batch.times),
        )


SALUN = Method(
    name="salun",
    summary="Trains the half of the weights with the largest summed guided gradients to answer as another concept.",
    source="SalUn, ICLR 2024, arXiv 2310.12508",
    settings={
        **AS_THE_MODEL_DRAWS,
        "locate__saliency": "guided",
        "locate__scaling": "none",
        "locate__keep": 0.5,
        "overwrite__parameters": "values",
        "overwrite__forget_weight": 1.0,
        "overwrite__retain_weight": 1.0,
        "overwrite__learning_rate": 1e-3,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
    },
    denoises=("retain",),
    options=Options,
    objective=RandomLabel,
)
