"""What unlearning did: how much of the concept is gone, and what it cost the rest.

`answers` says what is drawn, `drawings` draws it once and keeps it, `judging` who says what it shows (`clip_judge` and
`plugin_judge` for models without judges of their own), `metrics` what is measured on it, one file a metric; `run`
gathers the numbers and `requirements` says which fall short. `attacks` try to get the concept back.
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
