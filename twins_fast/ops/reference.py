"""Plain PyTorch definition of every op; in float64 it is what the oracle compares with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.ops.wing import Wing


def twin_batch_norm(
    x: Tensor,
    split: int,
    frozen: Wing,
    adaptive: Wing,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    both_adaptive: bool = False,
) -> Tensor:
    """Two-wing batch norm (TWINS, arXiv 2303.11135, section 4), to the bit two calls of ``F.batch_norm``.

    Arguments, shapes and results are those of :func:`twins_fast.ops.twin_batch_norm`, which is
    where they are checked. Differentiable to any order.
    """
    halves = []
    if split > 0:
        halves.append(F.batch_norm(x[:split], *frozen, training=both_adaptive, momentum=momentum, eps=eps))
    if split < x.shape[0]:
        halves.append(F.batch_norm(x[split:], *adaptive, training=True, momentum=momentum, eps=eps))
    y = halves[0] if len(halves) == 1 else torch.cat(halves)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y
