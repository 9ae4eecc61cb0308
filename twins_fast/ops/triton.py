"""The Triton kernels: results and geometry for what :mod:`twins_fast.kernels.twin_bn` launches.

The functions have the signatures of :mod:`twins_fast.ops.phases`, and :func:`forward` and :func:`backward` run
all phases in two launches each. Tensors are dense and of one layout, vectors contiguous float32.
"""

from __future__ import annotations

from torch import Tensor

from twins_fast.kernels import twin_bn
from twins_fast.ops import layout
from twins_fast.ops.native import dtype_name


def forward(
    x, residual, split, frozen, adaptive, momentum, eps, relu, keep_bits, both_adaptive=False
) -> tuple[Tensor, Tensor, Tensor]:
    y, bits, stats = layout.forward_results(x, keep_bits, both_adaptive)
    results = (y, _if_any(bits), stats)
    twin_bn.forward(x, residual, _geometry(x, split), frozen, adaptive, *results, momentum, eps, relu)
    return y, bits, stats


def moments(x, split) -> Tensor:
    results = layout.empty_stats(x)
    twin_bn.moments(x, _geometry(x, split), results)
    return results


def apply(x, residual, split, frozen, adaptive, stats, eps, relu, keep_bits) -> tuple[Tensor, Tensor]:
    y, bits, _ = layout.forward_results(x, keep_bits)
    twin_bn.apply(x, residual, _geometry(x, split), frozen, adaptive, y, _if_any(bits), stats, eps, relu)
    return y, bits


def backward(dy, x, bits, split, frozen, adaptive, stats, eps, wanted) -> tuple[Tensor, ...]:
    results = layout.backward_results(x, wanted)
    dx, dresidual, *vectors = _wanted(results, wanted)
    geometry = _geometry(x, split)
    twin_bn.backward(dy, x, _if_any(bits), geometry, frozen, adaptive, stats, dx, dresidual, vectors, eps)
    return tuple(results)


def sums(dy, x, bits, split, frozen, stats) -> Tensor:
    totals = layout.empty_stats(x, 4)
    twin_bn.sums(dy, x, _if_any(bits), _geometry(x, split), frozen, stats, totals)
    return totals


def apply_backward(dy, x, bits, split, frozen, adaptive, stats, means, eps, wanted) -> tuple[Tensor, Tensor]:
    results = layout.backward_results(x, [*wanted, *[False] * 4])[:2]
    geometry = _geometry(x, split)
    twin_bn.apply_backward(
        dy, x, _if_any(bits), geometry, frozen, adaptive, stats, means, *_wanted(results, wanted), eps
    )
    return tuple(results)


def _geometry(x: Tensor, split: int) -> twin_bn.Geometry:
    return twin_bn.Geometry.of(x.shape, split, layout.is_channels_last(x), dtype_name(x.dtype))


def _if_any(bits: Tensor) -> Tensor | None:
    return bits if bits.numel() else None


def _wanted(results: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    return [result if want else None for result, want in zip(results, wanted, strict=True)]
