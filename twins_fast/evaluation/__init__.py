"""Evaluation of networks, clean and under attack."""

from twins_fast.evaluation.accuracy import Accuracy, evaluate

__all__ = ["Accuracy", "evaluate"]
