"""Element-wise activations besides ReLU: their names, numbers and, in PyTorch, their values and slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.models.clamp import clamp


class Activation(NamedTuple):
    """One of :data:`KINDS` with its two numbers, which most do not need."""

    kind: str
    a: float = 0.0
    b: float = 0.0


KINDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {  # in the order of the C++ kernels
    "silu": lambda x, a, b: F.silu(x),
    "sigmoid": lambda x, a, b: x.sigmoid(),
    "tanh": lambda x, a, b: x.tanh(),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x, a, b: F.hardswish(x),
    "hardsigmoid": lambda x, a, b: F.hardsigmoid(x),
    "leaky relu": lambda x, a, b: F.leaky_relu(x, a),
    "elu": lambda x, a, b: F.elu(x, a),
    "mish": lambda x, a, b: F.mish(x),
    "clamp open": lambda x, a, b: F.hardtanh(x, a, b),  # its derivative at the bounds is 0
    "clamp closed": lambda x, a, b: clamp(x, a, b),  # 1
}


def value_and_slope(activation: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of float32 ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = KINDS[activation.kind](leaf, activation.a, activation.b)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), slope
