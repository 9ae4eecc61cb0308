"""The float64 oracle of two-wing batch norm: how far results are from the exact ones, and how far they may be.

The reference is computed in float64, and every result has a bound that follows from the roundings that lead to it. A
rounding errs by at most one unit (2^-24 in float32) of the value that it rounds. Such values may cancel later, so that
errors are measured by a result's size: the sum of the absolute values that it adds up. n random roundings err by about
sqrt(n) units.

* Kernels add partial sums in chains of at most 512 terms: 23 units, with the scalings 32.
* A single chain of n terms (``long_sums``): 16 sqrt(n + 16) units. 16 of them cover the worst of many channels, and a
  variance summed about a value three deviations from the mean, which is ten times the one about the mean.
* Gradients of weights and biases are sums of n terms of random sign, whose partial sums are about as large as the root
  of the sum of squares: 16 sqrt(n + 16) units of that root, or 32 units of the size where it is less.
* Images in half precision are rounded to it once, at the end. PyTorch (``rounded_between``) rounds up to three values
  as large as the image's size; and the terms of gradients of weights and biases, which is at most a half-precision unit
  of each, and of their sum at most four deviations.

The mean is a sum over x: its size is the mean of |x|, however small the mean itself is. Gradients are compared under
the ReLU mask of the y at hand, which is compared, too: near zero either sign is right. What needs no arithmetic, such
as the gradient of the residual, has to be exact. All bounds leave room for float32 numbers below the smallest normal
one, which may be flushed to zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from twins_fast.ops import reference
from twins_fast.ops.wing import Wing

UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
TINY = torch.finfo(torch.float32).smallest_normal
CHAIN = 512  # terms of a kernel's longest float32 chain
SHORT = 32 * UNIT[torch.float32]  # relative error of what has no longer chains
AT_ONCE = 1 << 22  # values per float64 copy of an image
_DIMS = (0, 2, 3)


class Call(NamedTuple):
    """One call of :func:`twins_fast.ops.twin_batch_norm` and the gradient ``dy`` of its result.

    Images (x, residual or ``None``, dy) are [N, C, H, W], all float32, bfloat16 or float16. Wings are (running_mean,
    running_var, weight, bias), each float32 [C]; the running statistics of adaptive ones are those before the call.
    """

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    split: int
    frozen: Wing
    adaptive: Wing
    momentum: float
    eps: float
    relu: bool
    both_adaptive: bool = False


class Results(NamedTuple):
    """What a call and its backward pass gave, on the device of the call.

    y and the gradients of x and residual (``None`` without one) have the shape and dtype of x; the gradients of weights
    and biases (zeros for a wing without rows) and the running statistics after the call are float32 [C]; those of the
    first half are ``None`` unless both are adaptive.
    """

    y: Tensor
    dx: Tensor
    dresidual: Tensor | None
    dfrozen_weight: Tensor
    dfrozen_bias: Tensor
    dweight: Tensor
    dbias: Tensor
    running_mean: Tensor
    running_var: Tensor
    frozen_mean: Tensor | None = None
    frozen_var: Tensor | None = None


def errors(call: Call, results: Results, *, rounded_between: bool = False, long_sums: bool = False) -> dict[str, float]:
    """For each result, its largest error as a multiple of what rounding explains: at most 1 if it is right.

    Args:
        call: what was computed.
        results: what came of it; nothing is written.
        rounded_between: intermediate results may have been rounded to the dtype of x, as PyTorch's are.
        long_sums: any sum may be a single chain of float32 additions, as PyTorch's may be.

    Returns:
        Name of the result to its error, in [0, inf]; inf where a result is NaN. No name of what is ``None``.

    Raises:
        TypeError: x has another dtype than the three of a call.
        ValueError: a result is missing, or has another shape or dtype than it should.
    """
    _check(call, results)
    values, channels = call.x[:, 0].numel(), call.x.shape[1]
    step = max(1, AT_ONCE // values)
    worst = {name: 0.0 for name, result in results._asdict().items() if result is not None}
    for first in range(0, channels, step):  # channels are independent
        part = slice(first, first + step)
        some = Call(*(_in_float64(argument, part) for argument in call))
        computed = {name: _in_float64(getattr(results, name), part) for name in worst}
        if call.relu:
            some = some._replace(dy=some.dy.where(computed["y"] > 0, 0))
        expected = _expected(some)
        allowed = _allowed(some, expected, call.x.dtype, rounded_between, long_sums)
        for name, result in computed.items():
            error = (result - getattr(expected, name)).abs() / (getattr(allowed, name) + TINY)
            largest = error.max().item()
            worst[name] = max(worst[name], math.inf if math.isnan(largest) else largest)
    return worst


def _check(call: Call, results: Results) -> None:
    if call.x.dtype not in UNIT:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {call.x.dtype}")
    for name, result in results._asdict().items():
        absent = {"dresidual": call.residual is None and "without a residual"}
        absent |= dict.fromkeys(("frozen_mean", "frozen_var"), not call.both_adaptive and "unless both are adaptive")
        if absent.get(name):
            if result is not None:
                raise ValueError(f"{name} must be None {absent[name]}")
            continue
        if result is None:
            raise ValueError(f"{name} is missing")
        image = name in ("y", "dx", "dresidual")
        dtype, shape = (call.x.dtype, call.x.shape) if image else (torch.float32, call.x.shape[1:2])
        if result.dtype != dtype or result.shape != shape:
            what = f"{result.dtype} {tuple(result.shape)}"
            raise ValueError(f"{name} must be {dtype} {tuple(shape)}, got {what}")


def _in_float64(value, part: slice):
    """Channels ``part`` in float64; what is no tensor as it is."""
    if isinstance(value, (tuple, list)):
        return [_in_float64(vector, part) for vector in value]
    if not isinstance(value, Tensor):
        return value
    return (value[:, part] if value.dim() == 4 else value[part]).detach().double()


def _expected(call: Call) -> Results:
    """The results of the reference; ``call.dy`` is masked already."""
    statistics = [vector.clone() for vector in (*call.adaptive[:2], *call.frozen[:2])]  # which are written
    leaves = [t.clone().requires_grad_() for t in (call.x, *call.frozen[2:], *call.adaptive[2:])]
    wings = (*statistics[2:], *leaves[1:3]), (*statistics[:2], *leaves[3:])
    y = reference.twin_batch_norm(
        leaves[0], call.split, *wings, call.momentum, call.eps, call.residual, both_adaptive=call.both_adaptive
    )
    dx, *dvectors = torch.autograd.grad(y, leaves, call.dy, materialize_grads=True)  # a wing without rows has none
    y = y.detach()
    return Results(y.relu() if call.relu else y, dx, call.dy, *dvectors, *statistics)


class _Sum(NamedTuple):
    """A sum of each channel; tensors are [C, 1, 1]."""

    count: int  # terms
    value: Tensor
    absolute: Tensor  # sum of absolute values
    root: Tensor  # of the sum of squares

    @classmethod
    def of(cls, terms: Tensor, sizes: Tensor) -> _Sum:
        """``sizes``: the terms' absolute values, or their own sizes where they are differences."""
        total, absolute = (t.sum(_DIMS).view(-1, 1, 1) for t in (terms, sizes))
        return cls(terms[:, 0].numel(), total, absolute, sizes.square().sum(_DIMS).sqrt().view(-1, 1, 1))

    def error(self, relative: float) -> Tensor:
        """``relative``: that of a sum whose terms have one sign."""
        return torch.minimum(relative * self.absolute, _long(self.count) * self.root)

    def error_of_product(self, relative: float) -> Tensor:
        """The same, of the sum times what is itself off by ``relative``."""
        return torch.minimum(relative * self.absolute, relative * self.value.abs() + _long(self.count) * self.root)

    def spread(self) -> Tensor:
        """Error of the sum when each term is off by up to its absolute value, at random."""
        return torch.minimum(self.absolute, 4 * self.root)

    def size(self) -> Tensor:
        return torch.minimum(self.absolute, self.value.abs() + self.root)


def _long(count: int) -> float:
    """Relative error of a float32 sum in one chain."""
    return 16 * (count + 16) ** 0.5 * UNIT[torch.float32]


def _allowed(call: Call, expected: Results, dtype: torch.dtype, rounded_between: bool, long_sums: bool) -> Results:
    """What each result may be off by."""
    half = 0.0 if dtype == torch.float32 else UNIT[dtype]
    smallest = torch.finfo(dtype).smallest_normal  # below it numbers are evenly spaced
    y, dx, gradients = torch.zeros_like(call.x), torch.zeros_like(call.x), []
    y_size, dx_size = torch.zeros_like(call.x), torch.zeros_like(call.x)
    statistics = [torch.zeros_like(vector) for vector in (*call.adaptive[:2], *call.frozen[:2])]  # stay without rows
    for rows, wing in ((slice(0, call.split), call.frozen), (slice(call.split, None), call.adaptive)):
        x, g = call.x[rows], call.dy[rows]
        mean, var, weight, bias = (vector.view(-1, 1, 1) for vector in wing)
        count, adaptive = x[:, 0].numel(), call.both_adaptive or wing is call.adaptive
        relative, offset = SHORT, mean.abs()
        if adaptive and count:
            if long_sums and count > CHAIN:
                relative = _long(count)
            offset, squares = (t.mean(_DIMS).view(-1, 1, 1) for t in (x.abs(), x.square()))
            mean, var = x.mean(_DIMS).view(-1, 1, 1), x.var(_DIMS, correction=0).view(-1, 1, 1)
            # Old statistics count in full, because they may be computed as old + momentum (new - old).
            for i, new in enumerate((offset, squares)):
                of_wing = i if wing is call.adaptive else 2 + i
                statistics[of_wing] = relative * (wing[i].abs() + call.momentum * new.flatten())
        scale = (var + call.eps).rsqrt()
        xhat = (x.abs() + offset) * scale
        y_size[rows] = xhat * weight.abs() + bias.abs()
        if call.residual is not None:
            y_size[rows] += call.residual[rows].abs()
        y[rows] = relative * y_size[rows]
        dw, db = _Sum.of(g * (x - mean) * scale, g.abs() * xhat), _Sum.of(g, g.abs())
        for total in (dw, db):
            rounded = half * total.spread() if rounded_between else 0.0
            gradients.append((total.error(relative) + rounded).flatten())
        dx[rows], dx_size[rows] = relative * g.abs(), g.abs()
        if adaptive and count:  # dx = weight * scale * (g - mean(g) - xhat * mean(g * xhat))
            dx[rows] += (db.error_of_product(relative) + xhat * dw.error_of_product(relative)) / count
            dx_size[rows] += (db.size() + xhat * dw.size()) / count
        for image in (dx, dx_size):
            image[rows] *= weight.abs() * scale
    for image, size, want in ((y, y_size, expected.y), (dx, dx_size, expected.dx)):
        image += half * (3 * size if rounded_between else want.abs()).clamp_min(smallest)
    return Results(y, dx, torch.zeros_like(y), *gradients, *statistics)
