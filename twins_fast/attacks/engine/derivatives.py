"""Backward passes of a model's own that are the derivative of their forward, and may be left out of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

LARGEST = 1e4  # magnitude of the values that a function is looked at for
TOLERANCE = 1e-6  # of a gradient, relative to it and to the one that comes in, in float64
_APPLY = torch.autograd.Function.__dict__["apply"]


def differentiable_functions(model: nn.Module, images: Tensor) -> set[type]:
    """The ``autograd.Function`` classes in a forward of ``images`` that :func:`is_derivative` holds for."""
    seen: dict[type, bool] = {}

    def judge(function: type, *args: Any, **kwargs: Any) -> Any:
        if function not in seen:
            seen[function] = not kwargs and is_derivative(function, args)
        return _apply(function, *args, **kwargs)

    with _applied_by(judge), suppress(Exception):  # the export will fail in the same way, and say why
        model(images)
    return {function for function, good in seen.items() if good}


def is_derivative(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether an element-wise function of one tensor has a backward pass that is the derivative of its forward.

    Looked at in float64 on values of all magnitudes up to 1e4 and both signs, on 0 and 1, for gradients of all
    magnitudes: a straight-through estimator or a clipped gradient shows.

    Args:
        args: of a call, the tensor among them.
    """
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    if len(places) != 1 or not args[places[0]].is_floating_point():
        return False
    sizes = torch.logspace(-6, 0, 97, dtype=torch.float64) * LARGEST
    near = torch.linspace(-12, 12, 193, dtype=torch.float64)  # 0 among them
    values = torch.cat([sizes, -sizes, near, torch.tensor([-0.0, 1.0, -1.0], dtype=torch.float64)])
    generator = torch.Generator().manual_seed(0)
    values = values[torch.randperm(len(values), generator=generator)].view(1, 2, 5, -1).repeat(2, 1, 1, 1)
    drawn = torch.randn(values.shape, dtype=torch.float64, generator=generator)
    drawn[1] = 0  # what depends on other values would pass something there
    for scale in (1e-4, 1.0, 1e4):
        directions = drawn * scale
        try:
            results = []
            for apply in (_apply, forward_of):
                leaf = values.to(args[places[0]].device).clone().requires_grad_()
                with torch.enable_grad():
                    y = apply(function, *args[: places[0]], leaf, *args[places[0] + 1 :])
                    (gradient,) = torch.autograd.grad(y, leaf, directions.to(y))
                results.append((y.detach(), gradient))
        except Exception:  # whatever it is, it cannot be left out
            return False
        (y, own), (plain_y, plain) = results
        alike = y.shape == values.shape and torch.allclose(y, plain_y, rtol=TOLERANCE, atol=0)
        allowed = TOLERANCE * (plain.abs() + directions.abs().to(plain))
        if not alike or plain[1].any() or not ((own - plain).abs() <= allowed).all():
            return False
    return True


def forward_of(function: Any, *args: Any) -> Any:
    """The operations of its forward, which autograd differentiates by itself."""
    if function.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context:
        return function.forward(*args)
    return function.forward(_Context(), *args)


@contextmanager
def without_own_backward(functions: set[type], otherwise: Callable[..., Any]) -> Iterator[None]:
    """Inside the block these functions are their forwards; of others ``otherwise(function, ...)`` is the result."""

    def apply(function: type, *args: Any, **kwargs: Any) -> Any:
        if function in functions:
            return forward_of(function, *args)
        if getattr(function, "__module__", "").startswith("twins_fast."):
            return _apply(function, *args, **kwargs)
        return otherwise(function, *args, **kwargs)

    with _applied_by(apply):
        yield


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """As without :func:`_applied_by`."""
    return _APPLY.__get__(None, function)(*args, **kwargs)


class _Context:
    """What a forward is given to note things for its backward."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


@contextmanager
def _applied_by(apply: Callable[..., Any]) -> Iterator[None]:
    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield
