"""What unlearning did: how much of the concept is gone, and what it cost the rest. One file per family of metrics.

`unlearncanvas` has the accuracies UA, IRA and CRA, `phrasings` what is left of the concept in other words, `drift` the
pixel distance to the base model, `clip_judge` a judge for models without one of their own; `run` draws the images, has
them judged and gathers the numbers. `attacks` try to get the concept back.
"""

from fade.evaluation.answers import SEEDS, AnswerSet, first_seeds
from fade.evaluation.attacks import AttackRecord, AttackResult, attack
from fade.evaluation.metrics.drift import rms_difference
from fade.evaluation.metrics.phrasings import PhrasingResult, held_out
from fade.evaluation.run import Evaluation, evaluate, full_record

__all__ = [
    "SEEDS",
    "AnswerSet",
    "AttackRecord",
    "AttackResult",
    "Evaluation",
    "PhrasingResult",
    "attack",
    "evaluate",
    "first_seeds",
    "full_record",
    "held_out",
    "rms_difference",
]
