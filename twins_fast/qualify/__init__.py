"""Devices prove themselves: checks of the kernels in processes of their own, whose verdicts are kept."""

from twins_fast.qualify.run import qualify

__all__ = ["qualify"]
