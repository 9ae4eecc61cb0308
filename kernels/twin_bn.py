"""Two-wing batch norm in Triton: two launches per direction. Not yet run on a GPU.

Forward: partial moments of the adaptive half; then each program merges those of its channels and normalises its
rows of either half. Backward: partial sums, with all results of the frozen half on the way; then the adaptive half.

A program has a tile of channels and a slab of units. In channels-last memory a unit is a row of pixels' channels
and a tile BLOCK_V of them; in contiguous memory a unit is 8 neighbouring pixels (one byte of bits) of the tile's
single channel. Arithmetic is float32. There are no atomics and every sum has a fixed order, so that results are the
same from run to run for a given choice of block sizes (see tuning.py).

The functions have the signatures of :mod:`twins_fast.ops.phases`; formulas are those of csrc/cpu/twin_bn.cpp.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from twins_fast.kernels import tuning
from twins_fast.kernels.tuning import Config
from twins_fast.ops import layout

_MAX_SLABS = 128  # partial results per channel, which every program of the second launch reads
_MAX_PROGRAMS = 2**15  # per tile, less than CUDA's limit
_WIDE = 2**30  # from here on offsets are 64-bit: half the range of 32 bits leaves room for blocks that stick out


# Sizes reach the kernels as plain numbers and ALIGN says what they are multiples of: otherwise Triton would
# compile anew for every combination of sizes that are 1 or multiples of 16.
def _jit(*sizes: str):
    return triton.jit(do_not_specialize=[*sizes, "channels", "pixels", "groups", "first", "units", "chunk"])


@triton.jit
def _block(
    start,
    end,
    tile,
    channels,
    pixels,
    groups,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Offsets and masks of units [start, start + BLOCK_U): [BLOCK_U, BLOCK_V], and [BLOCK_U, BLOCK_V / 8] for bits."""
    unit = start + tl.arange(0, BLOCK_U)
    inside = (unit < end)[:, None]
    if WIDE:
        unit = unit.to(tl.int64)
    if LAST:
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        byte = tile * (BLOCK_V // 8) + tl.arange(0, BLOCK_V // 8)
        base = unit * channels
        mask = inside & (column < channels)[None, :]
        byte_offset = (unit * groups)[:, None] + byte[None, :]
        byte_mask = inside & (byte < groups)[None, :]
        offset = tl.multiple_of(base, ALIGN)[:, None] + column[None, :]
    else:
        image = unit // groups
        group = unit - image * groups
        row = image * channels + tile
        base = row * pixels + group * 8
        column = tl.arange(0, BLOCK_V)
        mask = inside & (group[:, None] * 8 + column[None, :] < pixels)
        byte_offset = (row * groups + group)[:, None]
        byte_mask = inside
        offset = tl.multiple_of(base, ALIGN)[:, None] + column[None, :]
    return offset, tl.max_constancy(mask, (1, ALIGN)), byte_offset, byte_mask


@triton.jit
def _values_before(unit, pixels, groups, LAST: tl.constexpr):
    """Values of one channel in units [0, unit)."""
    if LAST:
        return unit
    else:
        return unit // groups * pixels + tl.minimum(unit % groups * 8, pixels)


@triton.jit
def _total(v, LAST: tl.constexpr):
    """Sum of a block per channel: [BLOCK_V] or, where the tile is one channel, [1]."""
    if LAST:
        return tl.sum(v, 0)
    else:
        return tl.sum(tl.sum(v, 1)[:, None], 0)


@triton.jit
def _vector(pointer, c, live, default: tl.constexpr):
    """Values of a per-channel vector; ``default`` without one."""
    if pointer is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(pointer + c, mask=live, other=default)


@triton.jit
def _rstd(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _wide(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


# Triton's interpreter cuts float32 down to bfloat16 instead of rounding it.
_INTERPRETED = tl.constexpr(not isinstance(_wide, triton.JITFunction))


@triton.jit
def _store(pointer, offset, v, mask):
    dtype: tl.constexpr = pointer.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16:
        integer = v.to(tl.int32, bitcast=True)
        even = (integer + 0x7FFF + ((integer >> 16) & 1)) & -0x10000
        v = tl.where(v == v, even.to(tl.float32, bitcast=True), v)
    tl.store(pointer + offset, v.to(dtype), mask=mask)


@triton.jit
def _load_bits(bits, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    byte = tl.load(bits + byte_offset, mask=byte_mask, other=0).to(tl.int32)
    bit = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (BLOCK_U, BLOCK_V)) != 0


@triton.jit
def _store_bits(bits, v, mask, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    passes = tl.where(v <= 0, 0, mask.to(tl.int32))  # a NaN passes, as in torch.relu
    passes = tl.reshape(passes, (BLOCK_U, BLOCK_V // 8, 8)) << tl.arange(0, 8)[None, None, :]
    tl.store(bits + byte_offset, tl.sum(passes, 2).to(tl.uint8), mask=byte_mask)


@triton.jit
def _gradient(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    """dy where the ReLU passed, everywhere without bits."""
    g = _wide(dy, offset, mask)
    if bits is not None:
        g = tl.where(_load_bits(bits, byte_offset, byte_mask, BLOCK_U, BLOCK_V), g, 0.0)
    return g


@triton.jit
def _load_partial(partial, row, slab, slabs, c, live, channels, LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Row 0 or 1 of each slab in ``partial`` [slabs, 2, C]; zeros where there is none."""
    base = (slab * 2 + row) * channels
    mask = (slab < slabs)[:, None] & live[None, :]
    if LAST:  # then ALIGN divides the number of channels
        base = tl.multiple_of(base, ALIGN)
        mask = tl.max_constancy(mask, (1, ALIGN))
    return tl.load(partial + (base[:, None] + c[None, :]), mask=mask, other=0.0)


@triton.jit
def _merge_moments(
    partial,
    c,
    live,
    slabs,
    slab_chunk,
    count,
    channels,
    pixels,
    groups,
    first,
    units,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared deviations of the slabs' union (Chan, Golub and LeVeque, 1979).

    Sums are taken about the mean of one slab, which loses at most a factor of the number of slabs.
    """
    pivot = tl.load(partial + c, mask=live, other=0.0)
    sum1 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum2 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s in range(0, slabs, BLOCK_S):
        slab = s + tl.arange(0, BLOCK_S)
        means = _load_partial(partial, 0, slab, slabs, c, live, channels, LAST, ALIGN)
        m2 = _load_partial(partial, 1, slab, slabs, c, live, channels, LAST, ALIGN)
        if WIDE:
            slab = slab.to(tl.int64)
        start = tl.minimum(first + slab * slab_chunk, units)
        end = tl.minimum(start + slab_chunk, units)
        n = _values_before(end, pixels, groups, LAST) - _values_before(start, pixels, groups, LAST)
        d = means - pivot[None, :]
        weighted = n.to(tl.float32)[:, None] * d  # 0 past the last slab
        sum1 += weighted
        sum2 += m2 + weighted * d
    total = tl.sum(sum1, 0)
    shift = tl.div_rn(total, count)
    m2 = tl.sum(sum2, 0) - total * shift
    return pivot + shift, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _merge_sums(
    partial,
    c,
    live,
    slabs,
    channels,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the slabs of both rows of ``partial`` [slabs, 2, C]."""
    sum1 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum2 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s in range(0, slabs, BLOCK_S):
        slab = s + tl.arange(0, BLOCK_S)
        sum1 += _load_partial(partial, 0, slab, slabs, c, live, channels, LAST, ALIGN)
        sum2 += _load_partial(partial, 1, slab, slabs, c, live, channels, LAST, ALIGN)
    return tl.sum(sum1, 0), tl.sum(sum2, 0)


@_jit()
def moments_kernel(
    x,
    partial,  # [slabs, 2, C]: mean and sum of squared deviations of each slab
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    slab = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    row = partial + slab * 2 * channels
    if WIDE:
        slab = slab.to(tl.int64)
    start = first + slab * chunk
    end = tl.minimum(start + chunk, units)
    before = _values_before(start, pixels, groups, LAST)
    # Squares about the mean of the first block lose at most a factor of the number of blocks.
    offset, mask, _, _ = _block(start, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V)
    count = _values_before(tl.minimum(start + BLOCK_U, end), pixels, groups, LAST) - before
    pivot = tl.div_rn(_total(_wide(x, offset, mask), LAST), count.to(tl.float32))
    sum1 = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    sum2 = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    for u in range(start, end, BLOCK_U):
        offset, mask, _, _ = _block(u, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V)
        d = tl.where(mask, _wide(x, offset, mask) - pivot[None, :], 0.0)
        sum1 += d
        sum2 += d * d
    total = _total(sum1, LAST)
    count = _values_before(end, pixels, groups, LAST) - before
    shift = tl.div_rn(total, count.to(tl.float32))
    m2 = _total(sum2, LAST) - total * shift
    tl.store(row + c, pivot + shift, mask=live)
    tl.store(row + channels + c, tl.where(m2 < 0, 0.0, m2), mask=live)


@_jit("slabs", "slab_chunk", "count")
def merge_moments_kernel(
    partial,
    moments,  # [2, C]
    count,
    slabs,
    slab_chunk,
    channels,
    pixels,
    groups,
    first,
    units,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    if partial is None:
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = mean
    else:
        mean, m2 = _merge_moments(
            partial,
            c,
            live,
            slabs,
            slab_chunk,
            count,
            channels,
            pixels,
            groups,
            first,
            units,
            LAST,
            WIDE,
            ALIGN,
            BLOCK_S,
            BLOCK_C,
        )
    tl.store(moments + c, mean, mask=live)
    tl.store(moments + channels + c, m2, mask=live)


@_jit("slabs", "slab_chunk", "count", "momentum", "eps", "programs")
def apply_kernel(
    x,
    residual,
    y,
    bits,
    frozen_mean,
    frozen_var,
    frozen_weight,
    frozen_bias,
    running_mean,
    running_var,
    weight,
    bias,
    partial,  # of the moments, or
    given,  # the statistics themselves, or neither where there is no adaptive row
    stats,
    momentum,
    eps,
    count,
    slabs,
    slab_chunk,
    programs,  # per tile, of the adaptive half
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    if program < programs:
        if partial is not None:
            mean, m2 = _merge_moments(
                partial,
                c,
                live,
                slabs,
                slab_chunk,
                count,
                channels,
                pixels,
                groups,
                first,
                units,
                LAST,
                WIDE,
                ALIGN,
                BLOCK_S,
                BLOCK_C,
            )
            rstd = _rstd(tl.div_rn(m2, count), eps)
            if program == 0:  # nobody else reads what it writes
                tl.store(stats + c, mean, mask=live)
                tl.store(stats + channels + c, rstd, mask=live)
                if running_mean is not None:
                    old = tl.load(running_mean + c, mask=live)
                    tl.store(running_mean + c, (1.0 - momentum) * old + momentum * mean, mask=live)
                if running_var is not None:
                    old = tl.load(running_var + c, mask=live)
                    new = tl.div_rn(m2, count - 1.0)
                    tl.store(running_var + c, (1.0 - momentum) * old + momentum * new, mask=live)
        else:
            mean = _vector(given, c, live, 0.0)
            rstd = _vector(given, channels + c, live, 0.0)
        scale = rstd * _vector(weight, c, live, 1.0)
        shift = _vector(bias, c, live, 0.0)
        # From the last slab to the first: what was read last is still in the cache.
        start = programs - 1 - program
        if WIDE:
            start = start.to(tl.int64)
        start = first + start * chunk
        end = tl.minimum(start + chunk, units)
    else:
        mean = _vector(frozen_mean, c, live, 0.0)
        scale = _rstd(_vector(frozen_var, c, live, 1.0), eps) * _vector(frozen_weight, c, live, 1.0)
        shift = _vector(frozen_bias, c, live, 0.0)
        start = program - programs
        if WIDE:
            start = start.to(tl.int64)
        start = start * chunk
        end = tl.minimum(start + chunk, first)
    if stats is not None and partial is None:
        if program == 0:
            tl.store(stats + c, tl.zeros((BLOCK_C,), tl.float32), mask=live)
            tl.store(stats + channels + c, tl.zeros((BLOCK_C,), tl.float32), mask=live)
    for u in range(start, end, BLOCK_U):
        offset, mask, byte_offset, byte_mask = _block(
            u, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V
        )
        # x - mean first, since it is exact where they are close.
        v = (_wide(x, offset, mask) - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            v += _wide(residual, offset, mask)
        if bits is not None:
            _store_bits(bits, v, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
        if RELU:
            v = tl.where(v <= 0, 0.0, v)
        _store(y, offset, v, mask)


# With g = dy where the ReLU passed, xc = x - mean and M values per channel, the adaptive half has
#   dbias = sum g,  dweight = rstd * sum(g * xc),
#   dx = weight * rstd * (g - dbias / M - xc * rstd * dweight / M),
# and the frozen half, whose statistics are constants, dx = weight * rstd * g.


@_jit("eps", "programs")
def sums_kernel(
    dy,
    x,
    bits,
    frozen_mean,
    frozen_var,
    frozen_weight,
    stats,
    dx,  # of the frozen half, as dresidual
    dresidual,
    frozen_partial,  # [slabs, 2, C]: sums of g and g * xc, or None, as partial
    partial,
    eps,
    programs,  # per tile, of the frozen half
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    sum_g = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    sum_gx = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    if program < programs:
        mean = _vector(frozen_mean, c, live, 0.0)
        scale = _rstd(_vector(frozen_var, c, live, 1.0), eps) * _vector(frozen_weight, c, live, 1.0)
        slab = program
        if WIDE:
            slab = slab.to(tl.int64)
        start = slab * chunk
        end = tl.minimum(start + chunk, first)
        for u in range(start, end, BLOCK_U):
            offset, mask, byte_offset, byte_mask = _block(
                u, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V
            )
            g = _gradient(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
            if frozen_partial is not None:
                sum_g += g
                sum_gx += g * (_wide(x, offset, mask) - mean[None, :])
            if dx is not None:
                _store(dx, offset, g * scale[None, :], mask)
            if dresidual is not None:
                _store(dresidual, offset, g, mask)
        if frozen_partial is not None:
            row = frozen_partial + program * 2 * channels
            tl.store(row + c, _total(sum_g, LAST), mask=live)
            tl.store(row + channels + c, _total(sum_gx, LAST), mask=live)
    else:
        if partial is not None:
            mean = tl.load(stats + c, mask=live, other=0.0)
            slab = program - programs
            row = partial + slab * 2 * channels
            if WIDE:
                slab = slab.to(tl.int64)
            start = first + slab * chunk
            end = tl.minimum(start + chunk, units)
            for u in range(start, end, BLOCK_U):
                offset, mask, byte_offset, byte_mask = _block(
                    u, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V
                )
                g = _gradient(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
                sum_g += g
                sum_gx += g * (_wide(x, offset, mask) - mean[None, :])
            tl.store(row + c, _total(sum_g, LAST), mask=live)
            tl.store(row + channels + c, _total(sum_gx, LAST), mask=live)


@_jit("frozen_slabs", "slabs")
def merge_sums_kernel(
    frozen_partial,
    partial,
    totals,  # [4, C]
    frozen_slabs,
    slabs,
    channels,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    frozen_g, frozen_gx = _sums_of(frozen_partial, c, live, frozen_slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C)
    g, gx = _sums_of(partial, c, live, slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C)
    tl.store(totals + c, frozen_g, mask=live)
    tl.store(totals + channels + c, frozen_gx, mask=live)
    tl.store(totals + 2 * channels + c, g, mask=live)
    tl.store(totals + 3 * channels + c, gx, mask=live)


@triton.jit
def _sums_of(
    partial,
    c,
    live,
    slabs,
    channels,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """:func:`_merge_sums`, or zeros where there was nothing to add up."""
    if partial is None:
        g = tl.zeros((BLOCK_C,), tl.float32)
        gx = g
    else:
        g, gx = _merge_sums(partial, c, live, slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C)
    return g, gx


@_jit("eps", "count", "frozen_slabs", "slabs", "programs")
def apply_backward_kernel(
    dy,
    x,
    bits,
    frozen_var,
    weight,
    stats,
    frozen_partial,
    partial,  # of the sums, or
    means,  # [2, C], what they come to per value, or neither where dx is not wanted
    dx,  # of the adaptive half, as dresidual
    dresidual,
    dfrozen_weight,
    dfrozen_bias,
    dweight,
    dbias,
    eps,
    count,
    frozen_slabs,
    slabs,
    programs,
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    rstd = tl.load(stats + channels + c, mask=live, other=0.0)
    g_total, gx_total = _sums_of(partial, c, live, slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C)
    if program == 0:
        if dfrozen_weight is not None or dfrozen_bias is not None:
            frozen_g, frozen_gx = _sums_of(
                frozen_partial, c, live, frozen_slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C
            )
            if dfrozen_weight is not None:
                frozen_rstd = _rstd(_vector(frozen_var, c, live, 1.0), eps)
                tl.store(dfrozen_weight + c, frozen_gx * frozen_rstd, mask=live)
            if dfrozen_bias is not None:
                tl.store(dfrozen_bias + c, frozen_g, mask=live)
        if dweight is not None:
            tl.store(dweight + c, gx_total * rstd, mask=live)
        if dbias is not None:
            tl.store(dbias + c, g_total, mask=live)
    if dx is not None or dresidual is not None:
        if dx is not None:
            if partial is not None:
                mean_g = tl.div_rn(g_total, count)
                mean_gx = tl.div_rn(gx_total, count)
            else:
                mean_g = tl.load(means + c, mask=live, other=0.0)
                mean_gx = tl.load(means + channels + c, mask=live, other=0.0)
            mean = tl.load(stats + c, mask=live, other=0.0)
            scale = rstd * _vector(weight, c, live, 1.0)
            slope = mean_gx * rstd * rstd
        start = programs - 1 - program  # the last first, as in the forward pass
        if WIDE:
            start = start.to(tl.int64)
        start = first + start * chunk
        end = tl.minimum(start + chunk, units)
        for u in range(start, end, BLOCK_U):
            offset, mask, byte_offset, byte_mask = _block(
                u, end, tile, channels, pixels, groups, LAST, WIDE, ALIGN, BLOCK_U, BLOCK_V
            )
            g = _gradient(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
            if dx is not None:
                xc = _wide(x, offset, mask) - mean[None, :]
                _store(dx, offset, (g - mean_g[None, :] - xc * slope[None, :]) * scale[None, :], mask)
            if dresidual is not None:
                _store(dresidual, offset, g, mask)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Walk(NamedTuple):
    """How the kernels go through a tensor: sizes, and what these promise about addresses."""

    last: bool
    channels: int
    pixels: int
    groups: int  # of 8 values, per row of memory
    first: int  # unit of the adaptive half
    units: int
    count: int  # values per channel in the adaptive half
    align: int
    wide: bool

    @classmethod
    def of(cls, x: Tensor, split: int) -> Walk:
        images, channels, height, width = x.shape
        last, pixels, run = layout.is_channels_last(x), height * width, layout.run(x)
        groups = (run + 7) // 8
        per_image = pixels if last else groups
        # A unit starts at a multiple of the run, or of 8 pixels in it.
        align = gcd(run, 16 if last else 8)
        sizes = split * per_image, images * per_image, (images - split) * pixels
        return cls(last, channels, pixels, groups, *sizes, align, x.numel() >= _WIDE)

    def sizes(self) -> dict:
        return dict(channels=self.channels, pixels=self.pixels, groups=self.groups, first=self.first, units=self.units)

    def blocks(self, config: Config) -> dict:
        """Block sizes of a walk over values: BLOCK_U units of BLOCK_V values, and BLOCK_C channels."""
        width = min(config.width, max(8, _power_of_2(self.channels))) if self.last else 8
        values = config.values if self.align >= 8 else config.values // 2  # more addresses are held at a time
        return dict(
            LAST=self.last,
            WIDE=self.wide,
            ALIGN=self.align,
            BLOCK_U=max(values // width, 1),
            BLOCK_V=width,
            BLOCK_C=width if self.last else 1,
        )

    def slabs(self, config: Config, blocks: dict, halves: tuple[int, int], limit: int, device: torch.device) -> Slabs:
        """Divide the units of the two halves evenly into slabs of whole blocks, at most ``limit`` in each half."""
        tiles = _ceil_div(self.channels, blocks["BLOCK_C"])
        wanted = min(max(config.programs * tuning.processors(device) // tiles, 1), limit)
        chunk = _ceil_div(max(sum(halves), 1), wanted * blocks["BLOCK_U"]) * blocks["BLOCK_U"]
        return Slabs(tiles, chunk, *(_ceil_div(units, chunk) for units in halves))


class Slabs(NamedTuple):
    tiles: int
    chunk: int  # units of each slab but the last one
    frozen: int
    adaptive: int

    def grid(self) -> tuple[int, int]:
        return self.tiles, self.frozen + self.adaptive


class Partial(NamedTuple):
    """What the first launch of a direction leaves for the second: [slabs, 2, C] float32, None without slabs."""

    frozen: Tensor | None
    adaptive: Tensor | None
    slabs: Slabs


_NOTHING = Partial(None, None, Slabs(0, 0, 0, 0))


def forward(x, residual, split, frozen, adaptive, momentum, eps, relu, keep_bits) -> tuple[Tensor, Tensor, Tensor]:
    y, bits, stats = layout.forward_results(x, keep_bits)
    walk = Walk.of(x, split)
    with _on_device_of(x):
        partial = _partial_moments(x, walk)
        _apply(x, residual, walk, frozen, adaptive, y, bits, stats, partial, None, momentum, eps, relu)
    return y, bits, stats


def moments(x, split) -> Tensor:
    stats = layout.empty_stats(x)
    walk = Walk.of(x, split)
    with _on_device_of(x):
        partial = _partial_moments(x, walk)
        blocks = _merging(walk)
        merge_moments_kernel[(_ceil_div(walk.channels, blocks["BLOCK_C"]),)](
            partial.adaptive, stats, **_merging_sizes(walk, partial), **walk.sizes(), WIDE=walk.wide, **blocks
        )
    return stats


def apply(x, residual, split, frozen, weight, bias, stats, eps, relu, keep_bits) -> tuple[Tensor, Tensor]:
    y, bits, _ = layout.forward_results(x, keep_bits)
    walk = Walk.of(x, split)
    with _on_device_of(x):
        _apply(x, residual, walk, frozen, (None, None, weight, bias), y, bits, None, _NOTHING, stats, 0.0, eps, relu)
    return y, bits


def backward(
    dy, x, bits, split, frozen_mean, frozen_var, frozen_weight, weight, stats, eps, wanted
) -> tuple[Tensor, ...]:
    results = layout.backward_results(x, wanted)
    dx, dresidual, *vectors = (result if want else None for result, want in zip(results, wanted, strict=True))
    frozen_sums, adaptive_sums = any(wanted[2:4]), wanted[0] or any(wanted[4:])
    walk = Walk.of(x, split)
    frozen = (frozen_mean, frozen_var, frozen_weight)
    with _on_device_of(x):
        partial = _partial_sums(dy, x, bits, walk, frozen, stats, dx, dresidual, eps, sums=(frozen_sums, adaptive_sums))
        _apply_backward(dy, x, bits, walk, frozen_var, weight, stats, partial, None, dx, dresidual, vectors, eps)
    return tuple(results)


def sums(dy, x, bits, split, frozen_mean, stats) -> Tensor:
    totals = layout.empty_stats(x, 4)
    walk = Walk.of(x, split)
    with _on_device_of(x):
        partial = _partial_sums(dy, x, bits, walk, (frozen_mean, None, None), stats, None, None, 0.0, sums=(True, True))
        blocks = _merging(walk)
        merge_sums_kernel[(_ceil_div(walk.channels, blocks["BLOCK_C"]),)](
            partial.frozen, partial.adaptive, totals, *partial.slabs[2:], walk.channels, **blocks
        )
    return totals


def apply_backward(
    dy, x, bits, split, frozen_var, frozen_weight, weight, stats, means, eps, wanted
) -> tuple[Tensor, Tensor]:
    results = layout.backward_results(x, [*wanted, *[False] * 4])
    dx, dresidual = (result if want else None for result, want in zip(results[:2], wanted, strict=True))
    walk = Walk.of(x, split)
    frozen = (None, frozen_var, frozen_weight)
    with _on_device_of(x):
        _partial_sums(dy, x, bits, walk, frozen, stats, dx, dresidual, eps, sums=(False, False))
        _apply_backward(dy, x, bits, walk, frozen_var, weight, stats, _NOTHING, means, dx, dresidual, [None] * 4, eps)
    return results[0], results[1]


def _partial_moments(x: Tensor, walk: Walk) -> Partial:
    if walk.first == walk.units:
        return _NOTHING

    def launch(config: Config) -> Partial:
        blocks = walk.blocks(config)
        slabs = walk.slabs(config, blocks, (0, walk.units - walk.first), _MAX_SLABS, x.device)
        partial = _empty_partial(x, slabs.adaptive)
        moments_kernel[slabs.grid()](x, partial, **walk.sizes(), chunk=slabs.chunk, **blocks, **_options(config))
        return Partial(None, partial, slabs)

    return launch(tuning.choose("moments", walk, x, launch))


def _apply(x, residual, walk, frozen, adaptive, y, bits, stats, partial, given, momentum, eps, relu) -> None:
    running, affine = adaptive[:2], adaptive[2:]
    has_rows = walk.first < walk.units
    halves = walk.first, walk.units - walk.first

    def launch(config: Config, running: tuple) -> None:
        blocks = walk.blocks(config)
        slabs = walk.slabs(config, blocks, halves, _MAX_PROGRAMS, x.device)
        apply_kernel[slabs.grid()](
            x,
            residual,
            y,
            bits if bits.numel() else None,
            *frozen,
            *running,
            *affine,
            partial.adaptive,
            given if has_rows else None,
            stats,
            momentum,
            eps,
            **_merging_sizes(walk, partial),
            programs=slabs.adaptive,
            **walk.sizes(),
            chunk=slabs.chunk,
            RELU=relu,
            **blocks,
            BLOCK_S=_merged_at_once(blocks["BLOCK_C"]),
            **_options(config),
        )

    def trial(config: Config) -> None:
        launch(config, [None if t is None else t.clone() for t in running])

    launch(tuning.choose("apply", walk, x, trial), running)


def _partial_sums(dy, x, bits, walk, frozen, stats, dx, dresidual, eps, sums: tuple[bool, bool]) -> Partial:
    images = dx is not None or dresidual is not None
    halves = (
        walk.first if sums[0] or images else 0,
        walk.units - walk.first if sums[1] else 0,
    )
    if halves == (0, 0):
        return _NOTHING

    def launch(config: Config) -> Partial:
        blocks = walk.blocks(config)
        slabs = walk.slabs(config, blocks, halves, _MAX_SLABS if any(sums) else _MAX_PROGRAMS, x.device)
        wanted = zip(sums, (slabs.frozen, slabs.adaptive), strict=True)
        partial = Partial(*(_empty_partial(x, number) if want and number else None for want, number in wanted), slabs)
        sums_kernel[slabs.grid()](
            dy,
            x,
            bits if bits.numel() else None,
            *frozen,
            stats,
            dx,
            dresidual,
            partial.frozen,
            partial.adaptive,
            eps,
            slabs.frozen,
            **walk.sizes(),
            chunk=slabs.chunk,
            **blocks,
            **_options(config),
        )
        return partial

    return launch(tuning.choose("sums", walk, x, launch))


def _apply_backward(dy, x, bits, walk, frozen_var, weight, stats, partial, means, dx, dresidual, vectors, eps) -> None:
    if walk.first == walk.units:
        dx = dresidual = None
    images = dx is not None or dresidual is not None
    if not images and all(vector is None for vector in vectors):
        return

    def launch(config: Config) -> None:
        blocks = walk.blocks(config)
        slabs = walk.slabs(config, blocks, (0, walk.units - walk.first if images else 0), _MAX_PROGRAMS, x.device)
        slabs = slabs._replace(adaptive=max(slabs.adaptive, 1))  # one writes the vectors in any case
        apply_backward_kernel[slabs.grid()](
            dy,
            x,
            bits if bits.numel() else None,
            frozen_var,
            weight,
            stats,
            partial.frozen,
            partial.adaptive,
            means,
            dx,
            dresidual,
            *vectors,
            eps,
            float(max(walk.count, 1)),
            partial.slabs.frozen,
            partial.slabs.adaptive,
            slabs.adaptive,
            **walk.sizes(),
            chunk=slabs.chunk,
            **blocks,
            BLOCK_S=_merged_at_once(blocks["BLOCK_C"]),
            **_options(config),
        )

    launch(tuning.choose("apply_backward", walk, x, launch) if images else tuning.default("apply_backward", x))


def _options(config: Config) -> dict:
    return dict(num_warps=config.warps, enable_fp_fusion=True)  # whatever Triton's default is


def _merged_at_once(channels: int) -> int:
    """BLOCK_S: how many slabs of all channels of a tile are merged at a time."""
    return min(max(2048 // channels, 1), 64)


def _merging(walk: Walk) -> dict:
    """Block sizes of the kernels that only merge."""
    channels = min(_power_of_2(walk.channels), 32)
    return dict(
        LAST=walk.last,
        ALIGN=walk.align,
        BLOCK_S=_merged_at_once(channels),
        BLOCK_C=channels,
        **_options(tuning.INTERPRETER),
    )


def _merging_sizes(walk: Walk, partial: Partial) -> dict:
    slabs = partial.slabs
    return dict(count=float(max(walk.count, 1)), slabs=slabs.adaptive, slab_chunk=slabs.chunk)


def _empty_partial(x: Tensor, slabs: int) -> Tensor:
    return x.new_empty((slabs, 2, x.shape[1]), dtype=torch.float32)


def _on_device_of(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
