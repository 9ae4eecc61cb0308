"""Training methods and their losses."""

from twins_fast.methods.losses import METHODS, adversarial_loss

__all__ = ["METHODS", "adversarial_loss"]
