"""Adversarial attacks: projected gradient descent (``pgd``), its objectives, and the engine that runs it."""

from twins_fast.attacks.pgd import PGD, named_attack

__all__ = ["PGD", "named_attack"]
