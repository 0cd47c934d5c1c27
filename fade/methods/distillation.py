"""FADE's two stages with the settings that measured best here (`fade.saliency`, `fade.distillation`)."""

from fade.methods.base import Method

DISTILLATION = Method(
    name="distillation",
    summary="Trains the located weights to answer the concept as its surrogate and everything else as before.",
    source="FADE, arXiv 2602.07058, with settings of ours",
)
