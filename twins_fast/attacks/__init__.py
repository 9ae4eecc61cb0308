"""Adversarial attacks: projected gradient descent, networks for the attacks of others, and the engine of both."""

from twins_fast.attacks.accelerate import accelerate
from twins_fast.attacks.pgd import PGD, named_attack

__all__ = ["PGD", "accelerate", "named_attack"]
