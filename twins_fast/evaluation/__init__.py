"""Evaluation of networks, clean and under attack."""

from twins_fast.evaluation.accuracy import Accuracy, evaluate
from twins_fast.evaluation.judge import judged
from twins_fast.evaluation.named import NamedAttack, attack_named, transfer
from twins_fast.evaluation.record import Record
from twins_fast.evaluation.results import Column, Results
from twins_fast.evaluation.robust import robust_accuracy

__all__ = [
    "Accuracy",
    "Column",
    "NamedAttack",
    "Record",
    "Results",
    "attack_named",
    "evaluate",
    "judged",
    "robust_accuracy",
    "transfer",
]
