"""Checks of arguments, and of a batch against a model; every error names the argument and the value.

None of them waits for a GPU: what is wrong with values there is raised by a later check (see deferred.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.deferred import check_values

ROUNDOFF = 1e-3  # by which computed values may miss a bound, relative to their range


def check_images(
    images: Tensor,
    model: nn.Module,
    bounds: tuple[float | Tensor, float | Tensor] = (0, 1),
    pixels: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Require ``images`` [N, C, H, W], floating point, finite, within ``bounds``, on the model's device.

    Args:
        bounds: numbers, or tensors that fit the images; those that are computed leave room for roundoff.
        pixels: makes of images what lies within the bounds.
    """
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
    seen = images if pixels is None else pixels(images)
    low, high = (per_image("bounds", bound, images) for bound in bounds)
    least, most = torch.aminmax(seen)
    numbers = not isinstance(low, Tensor) and not isinstance(high, Tensor)
    beyond = (low - least, most - high) if numbers else ((low - seen).amax(), (seen - high).amax())
    allowed = 0.0 if numbers and pixels is None else ROUNDOFF

    def look(least: float, most: float, below: float, above: float) -> None:
        if least != least or most != most:
            raise ValueError(f"images hold {int(images.isnan().sum())} NaN pixel values")
        if max(below, above) > allowed * (most - least):
            where = f"[{low:g}, {high:g}]" if numbers else "their bounds"
            raise ValueError(f"images must lie in {where}, got values from {least:.6g} to {most:.6g}")

    check_values(torch.stack([least, most, *beyond]), look)


def check_labels(labels: Tensor, images: Tensor) -> Tensor:
    """Require a label for every image, on its device; return the largest class, [] (-1 if there is none).

    Labels are [N] int64, not negative, or [N, classes] floating point: probabilities, which sum up to 1.
    """
    soft = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2
    if not soft and (not isinstance(labels, Tensor) or labels.dtype != torch.int64):
        raise TypeError(f"labels must be an int64 tensor [N], or probabilities [N, classes], got {_kind(labels)}")
    if labels.dim() != 1 + soft or labels.shape[0] != images.shape[0]:
        shape = f"[{images.shape[0]}, classes]" if soft else f"[{images.shape[0]}]"
        raise ValueError(f"labels must have shape {shape}, one per image, got {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"labels are on {labels.device}, but the images are on {images.device}")
    if labels.numel() == 0:
        return torch.full((), -1, device=labels.device)
    if soft:
        labels = labels.detach()
        smallest, off = labels.amin(), (labels.sum(1) - 1).abs().amax()

        def look_soft(smallest: float, off: float) -> None:
            if not (smallest >= 0 and off <= ROUNDOFF):
                raise ValueError("labels must be probabilities, not negative and 1 in sum")

        check_values(torch.stack([smallest, off]), look_soft)
        return torch.full((), labels.shape[1] - 1, device=labels.device)
    smallest, largest = torch.aminmax(labels)

    def look(smallest: int) -> None:
        if smallest < 0:
            raise ValueError(f"labels must not be negative, got {smallest}")

    check_values(smallest, look)
    return largest


def check_classes(largest_label: Tensor, classes: int, labels: Tensor | None = None) -> None:
    """Require a class of the model for every label; ``labels`` if they may be probabilities."""
    if labels is not None and labels.is_floating_point() and labels.shape[1] != classes:
        raise ValueError(f"labels hold probabilities of {labels.shape[1]} classes, but the model has {classes}")

    def look(largest: int) -> None:
        if largest >= classes:
            raise ValueError(f"labels hold class {largest}, but the model has {classes} classes")

    check_values(largest_label, look)


def indexable(labels: Tensor, classes: int) -> Tensor:
    """``labels`` themselves; on a GPU, where bad ones are not known yet, cut to [0, classes): they would end CUDA."""
    return labels.clamp(0, classes - 1) if labels.is_cuda and not labels.is_floating_point() else labels


def checked_logits(logits: Tensor, rows: int, largest_label: Tensor | None) -> Tensor:
    """Require ``logits`` [rows, classes] with a class for every label; half precision comes back as float32.

    Args:
        largest_label: of :func:`check_labels`; None if it is known to have a class.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return a tensor of logits, got {_kind(logits)}; PGD's output= takes them out")
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise ValueError(f"the model must return logits [{rows}, classes], got {list(logits.shape)}")
    if largest_label is not None:
        check_classes(largest_label, logits.shape[1])
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_not_negative(**values: float | Tensor) -> None:
    """Require every keyword to be a finite number >= 0, or a tensor of such."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            _check_tensor_not_negative(name, value)
        elif not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def _check_tensor_not_negative(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or a number, got {value.dtype}")

    def look(good: bool) -> None:
        if not good:
            raise ValueError(f"{name} must hold finite numbers >= 0")

    check_values(((value >= 0) & value.isfinite()).all(), look)


def check_radius(norm: str, eps: float | Tensor, bounds: tuple[float | Tensor, float | Tensor] = (0, 1)) -> None:
    """Require an L-infinity radius that the images' range leaves a meaning; tensors are not looked at."""
    if norm != "linf" or any(isinstance(number, Tensor) for number in (eps, *bounds)):
        return
    low, high = bounds
    if eps > high - low:
        hint = f"; did you mean {eps:g}/255?" if high - low == 1 else ""
        raise ValueError(f"eps must be at most {high - low:g}, as images are in [{low:g}, {high:g}], got {eps:g}{hint}")


def check_bounds(bounds: Any) -> None:
    """Require two finite numbers, or floating-point tensors, the lower one first."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be two numbers, the lowest and the highest pixel value, got {bounds!r}")
    if any(isinstance(bound, Tensor) for bound in bounds):
        return
    if not all(isinstance(b, Real) and abs(float(b)) < float("inf") for b in bounds) or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two finite numbers, the lower one first, got {bounds!r}")


def per_image(name: str, value: float | Tensor, images: Tensor) -> float | Tensor:
    """A number as it is; a tensor as [1 or N, 1 or C, 1, 1] for ``images`` [N, C, H, W].

    Raises:
        ValueError: another shape.
    """
    if not isinstance(value, Tensor):
        return value
    shape = tuple(value.shape) if value.dim() else (1, 1, 1)
    shape = (1, *shape) if len(shape) == 3 else shape
    count, channels = images.shape[:2]
    if len(shape) != 4 or shape[0] not in (1, count) or shape[1] not in (1, channels) or shape[2:] != (1, 1):
        raise ValueError(
            f"{name} must be a number or a tensor [{channels}, 1, 1], [{count}, 1, 1, 1] or [{count}, {channels}, 1, 1]"
            f", got shape {list(value.shape)}"
        )
    return value.detach().to(images.device, images.dtype).view(shape)


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
