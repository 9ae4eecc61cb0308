"""The phases of the fused kernels in plain PyTorch: what each backend's phases are tested against.

The functions have the signatures that every backend's module has (``implementation`` in backend.py). Between
a reduction and the apply that follows it, partial results of several processes can be merged.

x, residual and dy are [N, C, H, W], dense and of one layout; vectors of a wing are [C]. Arithmetic and statistics
are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from twins_fast.ops import layout
from twins_fast.ops.wing import Wing


def moments(x: Tensor, split: int) -> Tensor:
    """[2, C]: mean and sum of squared deviations of rows [split, N) per channel; zeros if there are none."""
    half = _at_least_float32(x[split:])
    if half.numel() == 0:
        return half.new_zeros(2, x.shape[1])
    mean = half.mean((0, 2, 3))
    return torch.stack([mean, (half - _per_channel(mean)).square().sum((0, 2, 3))])


def combine(counts: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge moments of disjoint sets (Chan, Golub and LeVeque, 1979).

    Args:
        counts: [K] values per channel in each set.
        parts: [K, 2, C] as from :func:`moments`.

    Returns:
        Count (scalar) and moments [2, C] of the union, in float64.
    """
    counts, (means, deviations) = counts.double(), parts.double().unbind(1)
    count, weights = counts.sum(), counts[:, None]
    mean = (weights * means).sum(0) / count
    return count, torch.stack([mean, (deviations + weights * (means - mean).square()).sum(0)])


def apply(
    x: Tensor,
    residual: Tensor | None,
    split: int,
    frozen: Wing,
    adaptive: Wing,
    stats: Tensor,
    eps: float,
    relu: bool,
    keep_bits: bool,
) -> tuple[Tensor, Tensor]:
    """y and the sign bits of the ReLU (see :func:`twins_fast.ops.layout.empty_bits`).

    ``stats`` is [2, C], mean and 1 / std of the adaptive rows, whose running statistics stay as they are.
    """
    halves = []
    if split > 0:
        rstd = (frozen.running_var + eps).rsqrt()
        halves.append(_affine(x[:split], frozen.running_mean, rstd, frozen.weight, frozen.bias))
    if split < x.shape[0]:
        halves.append(_affine(x[split:], *stats, adaptive.weight, adaptive.bias))
    y = torch.cat(halves)
    if residual is not None:
        y = y + residual
    passes = ~(y <= 0)  # a NaN passes, as in torch.relu
    if relu:
        y = y.where(passes, 0)
    return _like(y, x), _pack(passes, x) if keep_bits else layout.empty_bits(x, False)


def sums(dy: Tensor, x: Tensor, bits: Tensor, split: int, frozen: Wing, stats: Tensor) -> Tensor:
    """[4, C]: sum of g and of g * (x - mean) over the frozen, then over the adaptive rows.

    g is dy where the ReLU passed (everywhere without bits).
    """
    g = _masked(dy, bits)
    parts = []
    for rows, mean in ((slice(0, split), frozen.running_mean), (slice(split, None), stats[0])):
        centred = _at_least_float32(x[rows]) - _per_channel(stats[0] if mean is None else mean)
        parts += [g[rows].sum((0, 2, 3)), (g[rows] * centred).sum((0, 2, 3))]
    return torch.stack(parts)


def apply_backward(
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    split: int,
    frozen: Wing,
    adaptive: Wing,
    stats: Tensor,
    means: Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and residual, each empty unless ``wanted``.

    ``means`` is [2, C]: :func:`sums` of the adaptive rows divided by their count (Ioffe and Szegedy, 2015).
    """
    g = _masked(dy, bits)
    halves = []
    if split > 0:
        halves.append(_affine(g[:split], None, (frozen.running_var + eps).rsqrt(), frozen.weight, None))
    if split < x.shape[0]:
        mean, rstd = stats
        centred = _at_least_float32(x[split:]) - _per_channel(mean)
        v = g[split:] - _per_channel(means[0]) - centred * _per_channel(means[1] * rstd.square())
        halves.append(_affine(v, None, rstd, adaptive.weight, None))
    dx, dresidual = layout.backward_results(x, [*wanted, *[False] * 4])[:2]
    return _like(torch.cat(halves), x) if wanted[0] else dx, _like(g, x) if wanted[1] else dresidual


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(vector: Tensor) -> Tensor:
    """[C] as [1, C, 1, 1]."""
    return vector.view(1, -1, 1, 1)


def _affine(x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    v = _at_least_float32(x) if mean is None else _at_least_float32(x) - _per_channel(mean)
    v = v * _per_channel(rstd if weight is None else rstd * weight)
    return v if bias is None else v + _per_channel(bias)


def _like(y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(y)


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """``t`` as the matrix of runs that ``x`` is in memory."""
    return (t.permute(0, 2, 3, 1) if layout.is_channels_last(x) else t).reshape(-1, layout.run(x))


def _pack(passes: Tensor, x: Tensor) -> Tensor:
    rows = _rows(passes, x)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).view(len(rows), -1, 8)
    return (rows * 2 ** torch.arange(8, device=x.device)).sum(2, dtype=torch.uint8)


def _masked(dy: Tensor, bits: Tensor) -> Tensor:
    g = _at_least_float32(dy)
    if bits.numel() == 0:
        return g
    rows = (bits[:, :, None] >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1).flatten(1)
    rows = rows[:, : layout.run(dy)].bool()
    images, channels, height, width = dy.shape
    if layout.is_channels_last(dy):
        return g.where(rows.view(images, height, width, channels).permute(0, 3, 1, 2), 0)
    return g.where(rows.view(dy.shape), 0)
