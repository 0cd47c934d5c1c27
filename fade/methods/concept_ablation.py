"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516), model-based: the concept's prompt is answered as an
anchor's, on pictures of the anchor.

    L = ‖ε_θ'(z_t, c) − sg ε_θ'(z_t, c*)‖² + ‖ε_θ'(z_t^r, c_r) − ε‖²

z are pictures that the frozen model draws of the anchor c*, the surrogate; θ' is the model in training, so that the
target moves with it (it hardly does: c* is held by the second term, whose prompts hold the anchor's; not where every
picture of a retain folder has a caption, and captions take the place of prompts). Changed are the keys and values of
cross-attention. Ours: factors of a low rank instead of whole weights, with a learning rate for them (2e-6 a sample for
whole ones); the second term is on the retain set, which has more than the anchor.

On DigitCanvas (80 pictures) "three" had UA 100, IRA 97.2 and CRA 100, "neon" 100, 100 and 97.5.
"""

from torch import Tensor

from fade.methods.attention import keys_and_values
from fade.methods.base import AS_THE_MODEL_DRAWS, Method
from fade.objective import Batch, Objective


class Anchor(Objective):
    """What Concept Ablation trains on."""

    losses = ("ablate", "prior")
    moving = True

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(
            batch,
            lambda half: self.current(half.noised, half.times, half.answers),
            self.backbone.target(batch.clean, batch.noise, batch.times),
        )


CONCEPT_ABLATION = Method(
    name="concept-ablation",
    summary="Trains keys and values so that the concept's prompt is answered as the surrogate's, on its pictures.",
    source="Concept Ablation, ICCV 2023, arXiv 2303.13516",
    settings={
        **AS_THE_MODEL_DRAWS,
        "data__forget_from": "surrogate",
        "locate__granularity": "none",
        "overwrite__forget_weight": 1.0,
        "overwrite__retain_weight": 1.0,
        "overwrite__learning_rate": 1e-3,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
    },
    denoises=("retain",),
    objective=Anchor,
    holds_surrogate=True,
    targets=keys_and_values,
)
