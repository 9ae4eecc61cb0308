"""The attack engine."""

from twins_fast.attack.pgd import PGD, named_attack

__all__ = ["PGD", "named_attack"]
