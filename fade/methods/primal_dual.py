"""Distillation whose forget weight finds itself: dual ascent on the forget loss as a constraint (after FedORA, arXiv
2512.23171, which states it for classifiers; `Objective.weights`).

    min L_r  subject to  L_f ≤ bound · L_f⁰:   λ ← [λ + ρ (L_f / L_f⁰ − bound)]₊ after every step

with L_f⁰ the first step's forget loss, the frozen model's own. λ begins at `forget_weight`. It is an option of every
trained method whose forget loss is to fall; this one is distillation with it switched on. On DigitCanvas (80 pictures)
"three" had UA 100, IRA 98.6 and CRA 100, "neon" 100 in all three.
"""

from fade.methods.base import Method

PRIMAL_DUAL = Method(
    name="primal-dual",
    summary="Distillation under a constraint on the forget loss: its weight is found by dual ascent.",
    source="FedORA, arXiv 2512.23171, for diffusion by us",
    settings={"overwrite__dual_rate": 0.05, "overwrite__forget_weight": 0.0},
)
