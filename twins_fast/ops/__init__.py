"""The op: two-wing batch norm, its checks, its backends and what they share."""

from twins_fast.ops.twin_bn import twin_batch_norm

__all__ = ["twin_batch_norm"]
