"""What the kernels share: where a block of values and its bits are in memory, loads, stores, and launches.

Bits are [rows, ceil(length / 8)] uint8: bit k of byte b is value 8 b + k of the row, and what is left over is 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INDEX64_FROM = 2**30  # values; half the range of 32-bit offsets, which leaves room for blocks that stick out


def jit(*sizes: str):
    """``triton.jit`` for a kernel with these sizes besides the ones that all have.

    Sizes reach the kernels as plain numbers and ALIGN says what they are multiples of: otherwise Triton would
    compile anew for every combination of sizes that are 1 or multiples of 16.
    """
    return triton.jit(do_not_specialize=[*sizes, "channels", "pixels", "groups", "first", "units", "chunk"])


@triton.jit
def offsets_and_masks(
    start,
    end,
    tile,
    channels,
    pixels,
    groups,
    LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Offsets and masks of units [start, start + BLOCK_U): [BLOCK_U, BLOCK_V], and [BLOCK_U, BLOCK_V / 8] for bits."""
    unit = start + tl.arange(0, BLOCK_U)
    inside = (unit < end)[:, None]
    if INDEX64:
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
def load_vector(pointer, c, live, default: tl.constexpr):
    """Values of a per-channel vector; ``default`` without one."""
    if pointer is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(pointer + c, mask=live, other=default)


@triton.jit
def load_float32(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


# Triton's interpreter cuts float32 down to bfloat16 instead of rounding it.
INTERPRETED = tl.constexpr(not isinstance(load_float32, triton.JITFunction))


@triton.jit
def store(pointer, offset, v, mask):
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        integer = v.to(tl.int32, bitcast=True)
        even = (integer + 0x7FFF + ((integer >> 16) & 1)) & -0x10000
        v = tl.where(v == v, even.to(tl.float32, bitcast=True), v)
    tl.store(pointer + offset, v.to(dtype), mask=mask)


@triton.jit
def load_bits(bits, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    byte = tl.load(bits + byte_offset, mask=byte_mask, other=0).to(tl.int32)
    bit = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (BLOCK_U, BLOCK_V)) != 0


@triton.jit
def store_bits(bits, v, mask, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    passes = tl.where(v <= 0, 0, mask.to(tl.int32))  # a NaN passes, as in torch.relu
    passes = tl.reshape(passes, (BLOCK_U, BLOCK_V // 8, 8)) << tl.arange(0, 8)[None, None, :]
    tl.store(bits + byte_offset, tl.sum(passes, 2).to(tl.uint8), mask=byte_mask)


@triton.jit
def load_gated(pointer, bits, offset, mask, byte_offset, byte_mask, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr):
    """Values as float32, 0 where their bits are; as they are without bits."""
    v = load_float32(pointer, offset, mask)
    if bits is not None:
        v = tl.where(load_bits(bits, byte_offset, byte_mask, BLOCK_U, BLOCK_V), v, 0.0)
    return v


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
