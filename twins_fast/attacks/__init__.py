"""The attack engine."""

from twins_fast.attacks.pgd import PGD, named_attack

__all__ = ["PGD", "named_attack"]
