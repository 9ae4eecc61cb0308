"""Checks of arguments, and of a batch against a model; every error names the argument and the value.

None of them waits for a GPU: what is wrong with values there is raised by a later check (see deferred.py).
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from twins_fast.deferred import check_values


def check_images(images: Tensor, model: nn.Module) -> None:
    """Require ``images`` [N, C, H, W], floating point, finite, in [0, 1], on the model's device."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a floating-point tensor, got {_kind(images)}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is not None and first.device != images.device:
        raise ValueError(f"images are on {images.device}, but the model is on {first.device}")
    if images.numel() == 0:
        return
    images = images.detach()

    def look(low: float, high: float) -> None:
        if low != low or high != high:
            raise ValueError(f"images hold {int(images.isnan().sum())} NaN pixel values")
        if low < 0 or high > 1:
            raise ValueError(f"images must lie in [0, 1], got values from {low:.6g} to {high:.6g}")

    check_values(torch.stack(torch.aminmax(images)), look)


def check_labels(labels: Tensor, images: Tensor) -> Tensor:
    """Require ``labels`` [N], int64, not negative, on the images' device; return the largest, [] (-1 if none)."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {_kind(labels)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape [{images.shape[0]}], one per image, got {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"labels are on {labels.device}, but the images are on {images.device}")
    if labels.numel() == 0:
        return labels.new_full((), -1)
    smallest, largest = torch.aminmax(labels)

    def look(smallest: int) -> None:
        if smallest < 0:
            raise ValueError(f"labels must not be negative, got {smallest}")

    check_values(smallest, look)
    return largest


def check_classes(largest_label: Tensor, classes: int) -> None:
    """Require a class of the model for every label."""

    def look(largest: int) -> None:
        if largest >= classes:
            raise ValueError(f"labels hold class {largest}, but the model has {classes} classes")

    check_values(largest_label, look)


def indexable(labels: Tensor, classes: int) -> Tensor:
    """``labels`` themselves; on a GPU, where bad ones are not known yet, cut to [0, classes): they would end CUDA."""
    return labels.clamp(0, classes - 1) if labels.is_cuda else labels


def checked_logits(logits: Tensor, rows: int, largest_label: Tensor | None) -> Tensor:
    """Require ``logits`` [rows, classes] with a class for every label; half precision comes back as float32.

    Args:
        largest_label: of :func:`check_labels`; None if it is known to have a class.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return a tensor of logits, got {_kind(logits)}")
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise ValueError(f"the model must return logits [{rows}, classes], got {list(logits.shape)}")
    if largest_label is not None:
        check_classes(largest_label, logits.shape[1])
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_not_negative(**values: float) -> None:
    """Require every keyword to be a finite number >= 0."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_radius(norm: str, eps: float) -> None:
    """Require an L-infinity radius that images in [0, 1] leave a meaning."""
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps must be at most 1, as images are in [0, 1], got {eps:g}; did you mean {eps:g}/255?")


def check_integer(**values: object) -> None:
    """Require every keyword to be an integer, of Python or of NumPy."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r}")


def check_amp_dtype(amp_dtype: object) -> None:
    """Require a type of half precision, or None."""
    check_choice("amp_dtype", amp_dtype, (None, torch.bfloat16, torch.float16))


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Require ``value`` to be one of ``choices``."""
    if value not in list(choices):  # a list compares what cannot be hashed, too
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(sorted(map(str, choices)))}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
