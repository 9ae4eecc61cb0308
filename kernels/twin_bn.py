"""Two-wing batch norm in Triton: two launches per direction.

Forward: partial moments of the adaptive half; then each program merges those of its channels and normalises its
rows of either half. Backward: partial sums, with all results of the frozen half on the way; then the adaptive half.
Where both halves are adaptive, as many launches do for both what they do for the adaptive one.

A program has a tile of channels and a slab of units. In channels-last memory a unit is a row of pixels' channels
and a tile BLOCK_V of them; in contiguous memory a unit is 8 neighbouring pixels (one byte of bits) of the tile's
single channel. Arithmetic is float32. There are no atomics and every sum has a fixed order, so that results are the
same from run to run for a given choice of block sizes (see tuning.py).

The functions write to tensors of the caller's, :mod:`twins_fast.ops.triton`; formulas are those of
csrc/cpu/twin_bn.cpp. x, residual, dy and the results of their shape are [N, C, H, W], dense and of one layout; a wing
is (running_mean, running_var, weight, bias), each [C] float32 or None; stats are [2, C] float32, mean and 1 / std of
the adaptive rows, or [4, C] where both halves are adaptive, those of the first half last; bits are as in tiles.py,
None without.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles, tuning
from .tuning import Config

# Of a loop over blocks: up to three are on their way to shared memory while one is worked on. What a loop loads into
# registers the compiler puts right before its use, wherever registers are few.
STAGES = tl.constexpr(4)
_FEWEST_WARPS = 4  # of a program that was made smaller than its configuration


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
def _rstd(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


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
    INDEX64: tl.constexpr,
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
        if INDEX64:
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


@tiles.jit("programs")
def moments_kernel(
    x,
    partial,  # [slabs, 2, C]: mean and sum of squared deviations of each slab
    programs,  # per tile, of the first half, or None where that is not measured
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    LAST: tl.constexpr,
    INDEX64: tl.constexpr,
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
    begin = first
    limit = units
    if programs is not None:
        in_first = slab < programs
        begin = tl.where(in_first, 0, first)
        limit = tl.where(in_first, first, units)
        slab -= tl.where(in_first, 0, programs)
    if INDEX64:
        slab = slab.to(tl.int64)
    start = begin + slab * chunk
    end = tl.minimum(start + chunk, limit)
    before = _values_before(start, pixels, groups, LAST)
    # Squares about the mean of the first block lose at most a factor of the number of blocks.
    offset, mask, _, _ = tiles.offsets_and_masks(
        start, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
    )
    count = _values_before(tl.minimum(start + BLOCK_U, end), pixels, groups, LAST) - before
    pivot = tl.div_rn(_total(tiles.load_float32(x, offset, mask), LAST), count.to(tl.float32))
    sum1 = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    sum2 = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    for u in tl.range(start, end, BLOCK_U, num_stages=STAGES):
        offset, mask, _, _ = tiles.offsets_and_masks(
            u, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
        )
        d = tl.where(mask, tiles.load_float32(x, offset, mask) - pivot[None, :], 0.0)
        sum1 += d
        sum2 += d * d
    total = _total(sum1, LAST)
    count = _values_before(end, pixels, groups, LAST) - before
    shift = tl.div_rn(total, count.to(tl.float32))
    m2 = _total(sum2, LAST) - total * shift
    tl.store(row + c, pivot + shift, mask=live)
    tl.store(row + channels + c, tl.where(m2 < 0, 0.0, m2), mask=live)


@tiles.jit("slabs", "slab_chunk", "count")
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
    INDEX64: tl.constexpr,
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
            INDEX64,
            ALIGN,
            BLOCK_S,
            BLOCK_C,
        )
    tl.store(moments + c, mean, mask=live)
    tl.store(moments + channels + c, m2, mask=live)


@triton.jit
def _statistics(
    partial,
    stats,
    running_mean,
    running_var,
    c,
    live,
    writes,
    momentum,
    eps,
    slabs,
    slab_chunk,
    count,
    channels,
    pixels,
    groups,
    first,
    units,
    LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and 1 / std of units [first, units) from their partial moments; the program that ``writes`` keeps them."""
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
        INDEX64,
        ALIGN,
        BLOCK_S,
        BLOCK_C,
    )
    rstd = _rstd(tl.div_rn(m2, count), eps)
    if writes:  # nobody else reads what it writes
        tl.store(stats + c, mean, mask=live)
        tl.store(stats + channels + c, rstd, mask=live)
        if running_mean is not None:
            old = tl.load(running_mean + c, mask=live)
            tl.store(running_mean + c, (1.0 - momentum) * old + momentum * mean, mask=live)
        if running_var is not None:
            old = tl.load(running_var + c, mask=live)
            new = tl.div_rn(m2, count - 1.0)
            tl.store(running_var + c, (1.0 - momentum) * old + momentum * new, mask=live)
    return mean, rstd


@tiles.jit("slabs", "slab_chunk", "count", "frozen_slabs", "frozen_count", "momentum", "eps", "programs")
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
    stats_in,  # mean and 1 / std, or neither where there is no adaptive row
    frozen_partial,  # of the moments of the first half, if it is adaptive, too
    stats_out,
    momentum,
    eps,
    count,
    slabs,
    frozen_count,
    frozen_slabs,
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
    INDEX64: tl.constexpr,
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
            mean, rstd = _statistics(
                partial,
                stats_out,
                running_mean,
                running_var,
                c,
                live,
                program == 0,
                momentum,
                eps,
                slabs,
                slab_chunk,
                count,
                channels,
                pixels,
                groups,
                first,
                units,
                LAST,
                INDEX64,
                ALIGN,
                BLOCK_S,
                BLOCK_C,
            )
        else:
            mean = tiles.load_vector(stats_in, c, live, 0.0)
            rstd = tiles.load_vector(stats_in, channels + c, live, 0.0)
        scale = rstd * tiles.load_vector(weight, c, live, 1.0)
        shift = tiles.load_vector(bias, c, live, 0.0)
        slab = programs - 1 - program  # what was read last is still in the cache
    else:
        if frozen_partial is not None:
            mean, rstd = _statistics(
                frozen_partial,
                stats_out + 2 * channels,
                frozen_mean,
                frozen_var,
                c,
                live,
                program == programs,
                momentum,
                eps,
                frozen_slabs,
                slab_chunk,
                frozen_count,
                channels,
                pixels,
                groups,
                0,
                first,
                LAST,
                INDEX64,
                ALIGN,
                BLOCK_S,
                BLOCK_C,
            )
        else:
            mean = tiles.load_vector(frozen_mean, c, live, 0.0)
            rstd = _rstd(tiles.load_vector(frozen_var, c, live, 1.0), eps)
        scale = rstd * tiles.load_vector(frozen_weight, c, live, 1.0)
        shift = tiles.load_vector(frozen_bias, c, live, 0.0)
        slab = program - programs
    if stats_out is not None and partial is None:
        if program == 0:
            tl.store(stats_out + c, tl.zeros((BLOCK_C,), tl.float32), mask=live)
            tl.store(stats_out + channels + c, tl.zeros((BLOCK_C,), tl.float32), mask=live)
    if INDEX64:
        slab = slab.to(tl.int64)
    # Not in the branches: Triton 3.5 cannot compile a loop that starts where one of them says.
    start = tl.where(program < programs, first, 0) + slab * chunk
    end = tl.minimum(start + chunk, tl.where(program < programs, units, first))
    for u in tl.range(start, end, BLOCK_U, num_stages=STAGES):
        offset, mask, byte_offset, byte_mask = tiles.offsets_and_masks(
            u, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
        )
        # x - mean first, since it is exact where they are close.
        v = (tiles.load_float32(x, offset, mask) - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            v += tiles.load_float32(residual, offset, mask)
        if bits is not None:
            tiles.store_bits(bits, v, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
        if RELU:
            v = tl.where(v <= 0, 0.0, v)
        tiles.store(y, offset, v, mask)


# With g = dy where the ReLU passed, xc = x - mean and M values per channel, the adaptive half has
#   dbias = sum g,  dweight = rstd * sum(g * xc),
#   dx = weight * rstd * (g - dbias / M - xc * rstd * dweight / M),
# and the frozen half, whose statistics are constants, dx = weight * rstd * g.


@tiles.jit("eps", "programs")
def sums_kernel(
    dy,
    x,
    bits,
    frozen_mean,  # of the batch, without dx and dresidual, if the first half is adaptive, too
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
    INDEX64: tl.constexpr,
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
        mean = tiles.load_vector(frozen_mean, c, live, 0.0)
        scale = _rstd(tiles.load_vector(frozen_var, c, live, 1.0), eps) * tiles.load_vector(frozen_weight, c, live, 1.0)
        slab = program
        if INDEX64:
            slab = slab.to(tl.int64)
        start = slab * chunk
        end = tl.minimum(start + chunk, first)
        for u in tl.range(start, end, BLOCK_U, num_stages=STAGES):
            offset, mask, byte_offset, byte_mask = tiles.offsets_and_masks(
                u, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
            )
            g = tiles.load_gated(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
            if frozen_partial is not None:
                sum_g += g
                sum_gx += g * (tiles.load_float32(x, offset, mask) - mean[None, :])
            if dx is not None:
                tiles.store(dx, offset, g * scale[None, :], mask)
            if dresidual is not None:
                tiles.store(dresidual, offset, g, mask)
        if frozen_partial is not None:
            row = frozen_partial + program * 2 * channels
            tl.store(row + c, _total(sum_g, LAST), mask=live)
            tl.store(row + channels + c, _total(sum_gx, LAST), mask=live)
    else:
        if partial is not None:
            mean = tl.load(stats + c, mask=live, other=0.0)
            slab = program - programs
            row = partial + slab * 2 * channels
            if INDEX64:
                slab = slab.to(tl.int64)
            start = first + slab * chunk
            end = tl.minimum(start + chunk, units)
            for u in tl.range(start, end, BLOCK_U, num_stages=STAGES):
                offset, mask, byte_offset, byte_mask = tiles.offsets_and_masks(
                    u, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
                )
                g = tiles.load_gated(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
                sum_g += g
                sum_gx += g * (tiles.load_float32(x, offset, mask) - mean[None, :])
            tl.store(row + c, _total(sum_g, LAST), mask=live)
            tl.store(row + channels + c, _total(sum_gx, LAST), mask=live)


@tiles.jit("frozen_slabs", "slabs")
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


@triton.jit
def _gradients(
    partial,
    means,
    stats,
    weight,
    dweight,
    dbias,
    c,
    live,
    writes,
    count,
    slabs,
    channels,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of an adaptive half, what dx needs: mean, scale, offset and slope. The program that ``writes`` keeps the rest."""
    rstd = tl.load(stats + channels + c, mask=live, other=0.0)
    g, gx = _sums_of(partial, c, live, slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C)
    if writes:
        if dweight is not None:
            tl.store(dweight + c, gx * rstd, mask=live)
        if dbias is not None:
            tl.store(dbias + c, g, mask=live)
    if means is None:
        offset = tl.div_rn(g, count)
        mean_gx = tl.div_rn(gx, count)
    else:
        offset = tl.load(means + c, mask=live, other=0.0)
        mean_gx = tl.load(means + channels + c, mask=live, other=0.0)
    mean = tl.load(stats + c, mask=live, other=0.0)
    scale = rstd * tiles.load_vector(weight, c, live, 1.0)
    return mean, scale, offset, mean_gx * rstd * rstd


@tiles.jit("eps", "count", "frozen_count", "frozen_slabs", "slabs", "programs")
def apply_backward_kernel(
    dy,
    x,
    bits,
    frozen_var,
    frozen_weight,
    weight,
    stats,
    frozen_partial,
    partial,  # of the sums, or
    means,  # [2, C], what they come to per value, or neither where dx is not wanted
    dx,  # of adaptive halves, as dresidual
    dresidual,
    dfrozen_weight,
    dfrozen_bias,
    dweight,
    dbias,
    eps,
    count,
    frozen_count,  # None unless the first half is adaptive, too
    frozen_slabs,
    slabs,
    programs,  # per tile, of the second half
    channels,
    pixels,
    groups,
    first,
    units,
    chunk,
    LAST: tl.constexpr,
    INDEX64: tl.constexpr,
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
    begin = first
    limit = units
    if frozen_count is not None:
        begin = tl.where(program >= programs, 0, first)
        limit = tl.where(program >= programs, first, units)
    if (program >= programs) if frozen_count is not None else False:
        mean, scale, mean_g, slope = _gradients(
            frozen_partial,
            None,
            stats + 2 * channels,
            frozen_weight,
            dfrozen_weight,
            dfrozen_bias,
            c,
            live,
            program == programs,
            frozen_count,
            frozen_slabs,
            channels,
            LAST,
            ALIGN,
            BLOCK_S,
            BLOCK_C,
        )
        start = program - programs
    else:
        if frozen_count is None and (dfrozen_weight is not None or dfrozen_bias is not None):
            if program == 0:
                frozen_g, frozen_gx = _sums_of(
                    frozen_partial, c, live, frozen_slabs, channels, LAST, ALIGN, BLOCK_S, BLOCK_C
                )
                if dfrozen_weight is not None:
                    frozen_rstd = _rstd(tiles.load_vector(frozen_var, c, live, 1.0), eps)
                    tl.store(dfrozen_weight + c, frozen_gx * frozen_rstd, mask=live)
                if dfrozen_bias is not None:
                    tl.store(dfrozen_bias + c, frozen_g, mask=live)
        mean, scale, mean_g, slope = _gradients(
            partial,
            means,
            stats,
            weight,
            dweight,
            dbias,
            c,
            live,
            program == 0,
            count,
            slabs,
            channels,
            LAST,
            ALIGN,
            BLOCK_S,
            BLOCK_C,
        )
        start = programs - 1 - program  # the last first, as in the forward pass
    if dx is not None or dresidual is not None:
        if INDEX64:
            start = start.to(tl.int64)
        start = begin + start * chunk
        end = tl.minimum(start + chunk, limit)
        for u in tl.range(start, end, BLOCK_U, num_stages=STAGES):
            offset, mask, byte_offset, byte_mask = tiles.offsets_and_masks(
                u, end, tile, channels, pixels, groups, LAST, INDEX64, ALIGN, BLOCK_U, BLOCK_V
            )
            g = tiles.load_gated(dy, bits, offset, mask, byte_offset, byte_mask, BLOCK_U, BLOCK_V)
            if dx is not None:
                xc = tiles.load_float32(x, offset, mask) - mean[None, :]
                tiles.store(dx, offset, (g - mean_g[None, :] - xc * slope[None, :]) * scale[None, :], mask)
            if dresidual is not None:
                tiles.store(dresidual, offset, g, mask)


class Geometry(NamedTuple):
    """How the kernels go through a tensor: sizes, and what these promise about addresses."""

    channels_last: bool
    dtype: str  # which tuning goes by
    channels: int
    pixels: int
    groups: int  # of 8 values, per row of memory
    first: int  # unit of the adaptive half
    units: int
    count: int  # values per channel in the adaptive half
    frozen_count: int  # in the other one
    align: int
    index_64: bool

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], split: int, channels_last: bool, dtype: str) -> Geometry:
        """Of a dense tensor [N, C, H, W] whose adaptive half starts at row ``split``; dtype as ``"bfloat16"``."""
        images, channels, height, width = shape
        pixels = height * width
        run = channels if channels_last else pixels
        groups = (run + 7) // 8
        per_image = pixels if channels_last else groups
        # A unit starts at a multiple of the run, or of 8 pixels in it.
        align = gcd(run, 16 if channels_last else 8)
        sizes = split * per_image, images * per_image, (images - split) * pixels, split * pixels
        return cls(channels_last, dtype, channels, pixels, groups, *sizes, align, prod(shape) >= tiles.INDEX64_FROM)

    def kind(self) -> str:
        """What problems have in common that share block sizes; sizes up to a factor of 2."""
        memory = "channels_last" if self.channels_last else "contiguous"
        sizes = f"2^{(self.channels - 1).bit_length()} channels 2^{(self.units - 1).bit_length()} units"
        return f"{memory} {self.dtype} {sizes}"

    def sizes(self) -> dict:
        return dict(channels=self.channels, pixels=self.pixels, groups=self.groups, first=self.first, units=self.units)

    def divide(self, config: Config, halves: tuple[int, int], device: torch.device) -> tuple[dict, Slabs]:
        """How a kernel goes over the units of the two halves: the sizes of a block, and the slabs.

        Large programs leave few partial results. They get half the values and warps, and become twice as many, where
        there is less than a block for every multiprocessor, and where a tile of one channel has few slabs anyway.
        """
        processors = tuning.processors(device)
        while True:
            sizes = self._block(config)
            block = sizes["BLOCK_U"]
            channel_tiles = tiles.ceil_div(self.channels, sizes["BLOCK_C"])
            enough = channel_tiles * sum(halves) >= processors * block
            if (self.channels_last and enough) or config.warps <= _FEWEST_WARPS:
                break
            config = Config(config.values // 2, config.width, config.warps // 2, config.programs * 2)
        wanted = max(config.programs * processors // channel_tiles, 1)
        ways = [(wanted, wanted)]
        if all(halves):  # one program too many could take as long as all others
            share = wanted * halves[0] // sum(halves)
            ways = [(n, max(wanted - n, 1)) for n in (max(share, 1), max(min(share + 1, wanted - 1), 1))]
        chunk = max(block, min(max(map(tiles.ceil_div, halves, way)) for way in ways))
        slabs = Slabs(channel_tiles, chunk, *(tiles.ceil_div(units, chunk) for units in halves))
        return {**sizes, **_options(config.warps)}, slabs

    def _block(self, config: Config) -> dict:
        """Block sizes of a kernel that goes over values: BLOCK_U units of BLOCK_V values, and BLOCK_C channels."""
        width = min(config.width, max(8, tiles.power_of_2(self.channels))) if self.channels_last else 8
        # Of shared memory there is as much for values of four bytes as of two; of odd rows more addresses are held.
        values = config.values // 2 if self.dtype == "float32" or self.align < 8 else config.values
        return dict(
            LAST=self.channels_last,
            INDEX64=self.index_64,
            ALIGN=self.align,
            BLOCK_U=max(values // width, 1),
            BLOCK_V=width,
            BLOCK_C=width if self.channels_last else 1,
        )


class Slabs(NamedTuple):
    channel_tiles: int
    chunk: int  # units of each slab but the last one
    frozen: int
    adaptive: int

    def grid(self) -> tuple[int, int]:
        return self.channel_tiles, self.frozen + self.adaptive


class Partial(NamedTuple):
    """What the first launch of a direction leaves for the second: [slabs, 2, C] float32, None without slabs."""

    frozen: Tensor | None
    adaptive: Tensor | None
    slabs: Slabs


_NOTHING = Partial(None, None, Slabs(0, 0, 0, 0))


def forward(x, residual, geometry, frozen, adaptive, y, bits, stats, momentum, eps, relu) -> None:
    """Writes y, bits and stats, and updates the running statistics of adaptive wings."""
    both = stats.shape[0] == 4
    if both and not 0 < geometry.first < geometry.units:
        stats.zero_()  # nobody else writes those of a half without rows
    with tiles.on_device_of(x):
        partial = _partial_moments(x, geometry, both)
        _apply(x, residual, geometry, frozen, adaptive, y, bits, None, partial, stats, momentum, eps, relu)


def moments(x, geometry, moments) -> None:
    """Writes [2, C], mean and sum of squared deviations of the adaptive rows."""
    with tiles.on_device_of(x):
        partial = _partial_moments(x, geometry)
        blocks = _merging(geometry)
        merge_moments_kernel[(tiles.ceil_div(geometry.channels, blocks["BLOCK_C"]),)](
            partial.adaptive,
            moments,
            **_merging_sizes(geometry, partial),
            **geometry.sizes(),
            INDEX64=geometry.index_64,
            **blocks,
        )


def apply(x, residual, geometry, frozen, adaptive, y, bits, stats, eps, relu) -> None:
    """Writes y and bits from ``stats``; the running statistics of ``adaptive`` stay as they are."""
    adaptive = (None, None, *adaptive[2:])
    with tiles.on_device_of(x):
        _apply(x, residual, geometry, frozen, adaptive, y, bits, stats, _NOTHING, None, 0.0, eps, relu)


def backward(dy, x, bits, geometry, frozen, adaptive, stats, dx, dresidual, vectors, eps) -> None:
    """Writes dx, dresidual and ``vectors``, the gradients of both wings' weight and bias; None where not wanted."""
    both = stats.shape[0] == 4
    frozen_sums = (both and dx is not None) or any(vector is not None for vector in vectors[:2])
    adaptive_sums = dx is not None or any(vector is not None for vector in vectors[2:])
    of_frozen = ((stats[2], None, None), stats, None, None) if both else (frozen[:3], stats, dx, dresidual)
    with tiles.on_device_of(x):
        partial = _partial_sums(dy, x, bits, geometry, *of_frozen, eps, sums=(frozen_sums, adaptive_sums))
        _apply_backward(dy, x, bits, geometry, frozen, adaptive, stats, partial, None, dx, dresidual, vectors, eps)


def sums(dy, x, bits, geometry, frozen, stats, totals) -> None:
    """Writes [4, C]: sums of g and g * (x - mean) over the frozen, then over the adaptive rows."""
    with tiles.on_device_of(x):
        vectors = (frozen[0], None, None)
        partial = _partial_sums(dy, x, bits, geometry, vectors, stats, None, None, 0.0, sums=(True, True))
        blocks = _merging(geometry)
        merge_sums_kernel[(tiles.ceil_div(geometry.channels, blocks["BLOCK_C"]),)](
            partial.frozen,
            partial.adaptive,
            totals,
            partial.slabs.frozen,
            partial.slabs.adaptive,
            geometry.channels,
            **blocks,
        )


def apply_backward(dy, x, bits, geometry, frozen, adaptive, stats, means, dx, dresidual, eps) -> None:
    """Writes dx and dresidual from ``means`` [2, C], sums of the adaptive rows per value; None where not wanted."""
    with tiles.on_device_of(x):
        vectors = (None, *frozen[1:3])
        _partial_sums(dy, x, bits, geometry, vectors, stats, dx, dresidual, eps, sums=(False, False))
        _apply_backward(dy, x, bits, geometry, frozen, adaptive, stats, _NOTHING, means, dx, dresidual, [None] * 4, eps)


def _partial_moments(x: Tensor, geometry: Geometry, both: bool = False) -> Partial:
    halves = geometry.first if both else 0, geometry.units - geometry.first
    if halves == (0, 0):
        return _NOTHING

    def launch(config: Config, x: Tensor) -> Partial:
        blocks, slabs = geometry.divide(config, halves, x.device)
        partial = _empty_partial(x, slabs.frozen + slabs.adaptive)
        programs = slabs.frozen if both else None
        moments_kernel[slabs.grid()](x, partial, programs, **geometry.sizes(), chunk=slabs.chunk, **blocks)
        frozen, adaptive = partial.split([slabs.frozen, slabs.adaptive])
        return Partial(frozen if slabs.frozen else None, adaptive if slabs.adaptive else None, slabs)

    return launch(tuning.choose("moments", geometry.kind(), x, launch, (x,)), x)


def _apply(x, residual, geometry, frozen, adaptive, y, bits, stats_in, partial, stats_out, momentum, eps, relu) -> None:
    running = (*frozen[:2], *adaptive[:2])
    has_rows = geometry.first < geometry.units
    halves = geometry.first, geometry.units - geometry.first

    def launch(config: Config, running: Sequence[Tensor | None], x, residual, y, bits) -> None:
        blocks, slabs = geometry.divide(config, halves, x.device)
        apply_kernel[slabs.grid()](
            x,
            residual,
            y,
            bits,
            *running[:2],
            *frozen[2:],
            *running[2:],
            *adaptive[2:],
            partial.adaptive,
            stats_in if has_rows else None,
            partial.frozen,
            stats_out,
            momentum,
            eps,
            **_merging_sizes(geometry, partial),
            frozen_count=float(max(geometry.frozen_count, 1)),
            frozen_slabs=partial.slabs.frozen,
            programs=slabs.adaptive,
            **geometry.sizes(),
            chunk=slabs.chunk,
            RELU=relu,
            **blocks,
            BLOCK_S=_merged_at_once(blocks),
        )

    def trial(config: Config, *tensors) -> None:
        launch(config, [None if t is None else t.clone() for t in running], *tensors)

    tensors = x, residual, y, bits
    launch(tuning.choose("apply", geometry.kind(), x, trial, tensors), running, *tensors)


def _partial_sums(dy, x, bits, geometry, frozen, stats, dx, dresidual, eps, sums: tuple[bool, bool]) -> Partial:
    """``frozen`` is (running_mean, running_var, weight) of the frozen wing."""
    images = dx is not None or dresidual is not None
    halves = (
        geometry.first if sums[0] or images else 0,
        geometry.units - geometry.first if sums[1] else 0,
    )
    if halves == (0, 0):
        return _NOTHING

    def launch(config: Config, dy, x, bits, dx, dresidual) -> Partial:
        blocks, slabs = geometry.divide(config, halves, x.device)
        wanted = zip(sums, (slabs.frozen, slabs.adaptive), strict=True)
        partial = Partial(*(_empty_partial(x, number) if want and number else None for want, number in wanted), slabs)
        sums_kernel[slabs.grid()](
            dy,
            x,
            bits,
            *frozen,
            stats,
            dx,
            dresidual,
            partial.frozen,
            partial.adaptive,
            eps,
            slabs.frozen,
            **geometry.sizes(),
            chunk=slabs.chunk,
            **blocks,
        )
        return partial

    tensors = dy, x, bits, dx, dresidual
    return launch(tuning.choose("sums", geometry.kind(), x, launch, tensors), *tensors)


def _apply_backward(
    dy, x, bits, geometry, frozen, adaptive, stats, partial, means, dx, dresidual, vectors, eps
) -> None:
    both = stats.shape[0] == 4
    if geometry.first == geometry.units and not both:
        dx = dresidual = None
    images = dx is not None or dresidual is not None
    if not images and all(vector is None for vector in vectors):
        return
    _, frozen_var, frozen_weight, _ = frozen
    _, _, weight, _ = adaptive
    halves = geometry.first if both and images else 0, geometry.units - geometry.first if images else 0

    def launch(config: Config, dy, x, bits, dx, dresidual) -> None:
        blocks, slabs = geometry.divide(config, halves, x.device)
        # One writes the vectors in any case.
        slabs = slabs._replace(frozen=max(slabs.frozen, int(both)), adaptive=max(slabs.adaptive, 1))
        apply_backward_kernel[slabs.grid()](
            dy,
            x,
            bits,
            frozen_var,
            frozen_weight,
            weight,
            stats,
            partial.frozen,
            partial.adaptive,
            means,
            dx,
            dresidual,
            *vectors,
            eps,
            float(max(geometry.count, 1)),
            float(max(geometry.frozen_count, 1)) if both else None,
            partial.slabs.frozen,
            partial.slabs.adaptive,
            slabs.adaptive,
            **geometry.sizes(),
            chunk=slabs.chunk,
            **blocks,
            BLOCK_S=_merged_at_once(blocks),
        )

    tensors = dy, x, bits, dx, dresidual
    if images:
        config = tuning.choose("apply_backward", geometry.kind(), x, launch, tensors)
    else:
        config = tuning.default("apply_backward", x)
    launch(config, *tensors)


def _options(warps: int) -> dict:
    return dict(num_warps=warps, enable_fp_fusion=True)  # whatever Triton's default is


def _merged_at_once(blocks: dict) -> int:
    """BLOCK_S: how many slabs of all channels of a tile are merged at a time, 16 values of either row by a thread."""
    return min(max(512 * blocks["num_warps"] // blocks["BLOCK_C"], 1), 128)


def _merging(geometry: Geometry) -> dict:
    """Block sizes of the kernels that only merge."""
    blocks = dict(
        LAST=geometry.channels_last,
        ALIGN=geometry.align,
        BLOCK_C=min(tiles.power_of_2(geometry.channels), 32),
        **_options(8),
    )
    return {**blocks, "BLOCK_S": _merged_at_once(blocks)}


def _merging_sizes(geometry: Geometry, partial: Partial) -> dict:
    slabs = partial.slabs
    return dict(count=float(max(geometry.count, 1)), slabs=slabs.adaptive, slab_chunk=slabs.chunk)


def _empty_partial(x: Tensor, slabs: int) -> Tensor:
    return x.new_empty((slabs, 2, x.shape[1]), dtype=torch.float32)
