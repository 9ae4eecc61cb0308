"""Evaluation of networks, clean and under attack."""

from twins_fast.evaluation.accuracy import Accuracy, evaluate
from twins_fast.evaluation.judge import judged

__all__ = ["Accuracy", "evaluate", "judged"]
