"""The vectors of one wing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Wing(NamedTuple):
    """What a wing normalises with: each [C], or ``None``."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def wings_of(vectors: Sequence[Any]) -> tuple[Wing, Wing]:
    """The frozen and the adaptive wing from their vectors in a row, or from what is known of each of these."""
    return Wing(*vectors[:4]), Wing(*vectors[4:])


def written_by(frozen: Sequence[Any], adaptive: Sequence[Any], both_adaptive: bool) -> Sequence[Any]:
    """The running statistics that a call updates."""
    written = adaptive[0], adaptive[1]  # the compiler of PyTorch 2.6 knows no slices of a NamedTuple
    return (frozen[0], frozen[1], *written) if both_adaptive else written


def vectors_of_backward(frozen: Wing, adaptive: Wing) -> tuple[Any, Any, Any, Any]:
    """What the backward pass needs of both (named, as the compiler of PyTorch 2.6 cannot slice a named tuple)."""
    return frozen.running_mean, frozen.running_var, frozen.weight, adaptive.weight
