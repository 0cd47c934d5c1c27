"""FADE as its authors run it, in the sparse-per-weight variant, as far as public (a starting point, not our advice).

Ours: 200 steps, and a learning rate for them on a small model. The authors take 1e-4 in 1550 steps on UnlearnCanvas and
6e-4 on other sets; in 200 steps at 1e-4 DigitCanvas's "three" is still drawn in every picture (80 pictures), at 1e-3 it
had UA 100, IRA 97.2 and CRA 100, "neon" 100 in all three.
"""

from fade.methods.base import Method

FADE = Method(
    name="fade",
    summary="Distils LoRA factors under a mask of the half of the weights with the largest denoising gradients.",
    source="FADE, arXiv 2602.07058, with its authors' settings",
    settings={
        "locate__saliency": "denoising",
        "locate__scaling": "none",
        "locate__keep": 0.5,
        "locate__passes": 1,
        "overwrite__rank": 4,
        "overwrite__alpha": 4.0,
        "overwrite__learning_rate": 1e-3,
        "overwrite__warmup_steps": 0,
        "overwrite__weight_decay": 1e-2,
        "overwrite__forget_weight": 0.3,
        "overwrite__retain_weight": 1.0,
        "overwrite__steps": 200,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
        "overwrite__training_mode": "exact",
    },
)
