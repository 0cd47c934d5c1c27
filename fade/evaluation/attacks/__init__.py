"""Attacks: ways to get a forgotten concept back. One file each, and one line in `registry`.

An attack draws (`subject.Attack`); `run` gives it the model and its budget, has its pictures judged, compares with what
base and adapted model draw when nobody attacks, and keeps the record.
"""

from fade.evaluation.attacks.registry import ATTACKS, chosen_attacks
from fade.evaluation.attacks.run import AttackRecord, AttackResult, attack
from fade.evaluation.attacks.subject import Attack, CannotAttackError, Drawn, Subject

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackRecord",
    "AttackResult",
    "CannotAttackError",
    "Drawn",
    "Subject",
    "attack",
    "chosen_attacks",
]
