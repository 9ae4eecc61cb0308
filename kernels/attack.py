"""The steps of an attack's plan in Triton, on channels-last memory [pixels, C].

Storage is float32, bfloat16 or float16, arithmetic float32; ReLU masks are bits, [pixels, ceil(C / 8)] uint8 (see
tiles.py). A program has a tile of pixels and channels. The functions write to tensors of the caller's;
:mod:`twins_fast.attacks.engine.executors.torch` says what.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

KINDS = ("clamp", "add", "sub", "mul", "div")  # steps of an input program; enum PixelStep::Kind in pixels.h
MOST_STEPS = 8
MOST_CHANNELS = 4  # of images


class ConvolutionConfig(NamedTuple):
    """Block sizes of a convolution."""

    rows: int  # pixels of the result
    width: int  # its channels
    inner: int  # values of a tap that are multiplied at a time
    warps: int
    stages: int


# The fastest is measured at the first call.
CONVOLUTION_CONFIGS = [
    ConvolutionConfig(128, 128, 64, 8, 3),
    ConvolutionConfig(128, 128, 32, 8, 4),
    ConvolutionConfig(128, 64, 64, 4, 3),
    ConvolutionConfig(64, 64, 64, 4, 4),
    ConvolutionConfig(128, 256, 64, 8, 3),
    ConvolutionConfig(256, 128, 64, 8, 3),
]
INTERPRETER_CONVOLUTION = ConvolutionConfig(32, 16, 16, 4, 1)


class Product(NamedTuple):
    """One direction of a convolution as a matrix product: a sum over taps, each of them some values of the input.

    A row of the product is a pixel of the result, or a block of ``out_step`` pixels whose values are its columns. Rows
    come in ``phases``, each with taps of its own: row i of phase p is at pixel ``p + i * out_step``, down and across,
    and its taps start at pixels ``i * in_step + tap`` of the input, in whose rows values follow on each other.

    Attributes:
        weight: [columns, places down, places across, values of a tap].
        taps: [phases down, then phases across, 5] int32: their number, the first one and from each to the next; the
            place of the first one's weights and from each to the next.
        in_align: every tap starts at a multiple of so many values, up to 16.
        block_row: values of a row of a block; 0 without blocks.
    """

    weight: Tensor
    taps: Tensor
    phases: tuple[int, int]
    in_step: tuple[int, int]
    out_step: tuple[int, int]
    in_align: int
    block_row: int = 0


class Tables(NamedTuple):
    """How an image is upsampled: row r is repeated as rows [row_start[r], row_start[r + 1]), and columns alike."""

    row_start: Tensor  # [height + 1] int32
    column_start: Tensor
    size: tuple[int, int]
    most: tuple[int, int]  # repetitions of any row and column

    @classmethod
    def of(cls, rows: list[int], columns: list[int], size: tuple[int, int], device: torch.device) -> Tables:
        """From which of the ``size`` rows and columns each of the upsampled image's shows."""
        starts = [
            torch.searchsorted(torch.tensor(index), torch.arange(n + 1)).int()
            for index, n in zip((rows, columns), size, strict=True)
        ]
        most = tuple(int(start.diff().max()) for start in starts)
        return cls(*(start.to(device) for start in starts), (len(rows), len(columns)), most)


@triton.jit
def _start(program, BLOCK_U: tl.constexpr, INDEX64: tl.constexpr):
    if INDEX64:
        program = program.to(tl.int64)
    return program * BLOCK_U


@triton.jit
def _finish(
    v,
    shift,
    other,
    mask,
    y,
    bits,
    offset,
    inside,
    byte_offset,
    byte_inside,
    tile,
    channels,
    RELU: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """y = v + shift + other, then ReLU with its bits, or 0 where those of ``mask`` are."""
    if shift is not None:
        c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        v += tiles.load_vector(shift, c, c < channels, 0.0)[None, :]
    if other is not None:
        v += tiles.load_float32(other, offset, inside)
    if bits is not None:
        tiles.store_bits(bits, v, inside, byte_offset, byte_inside, BLOCK_U, BLOCK_V)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)
    if mask is not None:
        v = tl.where(tiles.load_bits(mask, byte_offset, byte_inside, BLOCK_U, BLOCK_V), v, 0.0)
    tiles.store(y, offset, v, inside)


@tiles.jit()
def pointwise_kernel(
    x,
    gate,  # bits: x counts as 0 where they are
    scale,
    shift,
    other,
    mask,
    y,
    bits,
    channels,
    groups,
    units,
    RELU: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    start, tile = _start(tl.program_id(0), BLOCK_U, INDEX64), tl.program_id(1)
    offset, inside, byte_offset, byte_inside = tiles.offsets_and_masks(
        start, units, tile, channels, 0, groups, True, INDEX64, ALIGN, BLOCK_U, BLOCK_V
    )
    v = tiles.load_gated(x, gate, offset, inside, byte_offset, byte_inside, BLOCK_U, BLOCK_V)
    if scale is not None:
        c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        v *= tiles.load_vector(scale, c, c < channels, 1.0)[None, :]
    _finish(
        v, shift, other, mask, y, bits, offset, inside, byte_offset, byte_inside, tile, channels,
        RELU, BLOCK_U, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _columns(v, i: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr):
    """The i-th WIDTH columns of v, by halves of halves; Triton before 3.5 compiles no recursion."""
    for level in tl.static_range(4):
        if BLOCK_V >> level > WIDTH:
            left, right = tl.split(tl.permute(tl.reshape(v, (BLOCK_U, 2, BLOCK_V >> level + 1)), (0, 2, 1)))
            if i * WIDTH // (BLOCK_V >> level + 1) % 2:
                v = right
            else:
                v = left
    return v


@triton.jit
def _finish_columns(
    v,
    shift,
    other,
    mask,
    y,
    bits,
    pixel,
    live,
    tile,
    columns,
    channels,
    groups,
    out_width,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """:func:`_finish` of a product, 32 columns at a time, so that few registers hold places."""
    WIDTH: tl.constexpr = 32 if BLOCK_V > 32 else BLOCK_V
    PARTS: tl.constexpr = BLOCK_V // WIDTH
    for i in tl.static_range(PARTS):
        part = tile * PARTS + i
        column = part * WIDTH + tl.arange(0, WIDTH)
        byte = part * (WIDTH // 8) + tl.arange(0, WIDTH // 8)
        inside = tl.max_constancy(live[:, None] & (column < columns)[None, :], (1, ALIGN))
        if BLOCK_ROW:
            column = column // BLOCK_ROW * (out_width * channels) + column % BLOCK_ROW
            column = tl.max_contiguous(tl.multiple_of(column, ALIGN), ALIGN)
        offset = tl.multiple_of(pixel * channels, ALIGN)[:, None] + column[None, :]
        byte_offset = (pixel * groups)[:, None] + byte[None, :]
        byte_inside = live[:, None] & (byte < groups)[None, :]
        _finish(
            _columns(v, i, BLOCK_U, BLOCK_V, WIDTH), shift, other, mask, y, bits, offset, inside, byte_offset,
            byte_inside, part, columns, RELU, BLOCK_U, WIDTH,
        )  # fmt: skip


@triton.jit
def _axis(taps, phase):
    """Of a phase along an axis: number of taps, the first one, to the next; place of its weights, to the next."""
    taps += 5 * phase
    return tl.load(taps), tl.load(taps + 1), tl.load(taps + 2), tl.load(taps + 3), tl.load(taps + 4)


@tiles.jit(
    "in_channels", "height", "width", "inner", "across", "pitch", "phases_y", "phases_x", "rows_y", "rows_x",
    "in_step_y", "in_step_x", "out_step_y", "out_step_x", "out_height", "out_width", "channel_tiles", "columns",
)  # fmt: skip
def convolution_kernel(
    x,
    weight,  # see Product
    taps,
    shift,
    other,
    mask,
    y,
    bits,
    in_channels,
    height,  # of x
    width,
    inner,  # values of a tap
    across,  # places of weights
    pitch,  # from a column's weights to the next one's
    phases_y,
    phases_x,
    rows_y,  # of the product, in a phase of an image
    rows_x,
    in_step_y,
    in_step_x,
    out_step_y,
    out_step_x,
    out_height,
    out_width,
    channel_tiles,
    columns,  # of the product
    channels,
    groups,
    units,  # rows of the product, in a phase
    RELU: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,  # of places in y, in x and in the weights
    ALIGN_X: tl.constexpr,
    ALIGN_W: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles and phases of the same pixels follow on each other, so that x comes from the cache for all but the first.
    program = tl.program_id(0)
    tile = program % channel_tiles
    program = program // channel_tiles
    phase_x = program % phases_x
    program = program // phases_x
    phase_y = program % phases_y
    unit = _start(program // phases_y, BLOCK_U, INDEX64) + tl.arange(0, BLOCK_U)
    line = unit // rows_x
    column_x = unit - line * rows_x
    image = line // rows_y
    row_y = line - image * rows_y
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)

    count_y, tap_y, next_y, place_y, next_place_y = _axis(taps, phase_y)
    count_x, tap_x, next_x, place_x, next_place_x = _axis(taps + 5 * phases_y, phase_x)
    top = row_y * in_step_y
    left = column_x * (in_step_x * in_channels)
    length = width * in_channels
    corner = (image * height + top) * length + left
    live = unit < units
    top = tl.where(live, top, 1 << 30)  # a row past the end sees no pixel
    total = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    i = 0  # number of the tap, down and across, and its first value that is multiplied now
    j = 0
    first = 0
    for _ in range(count_y * count_x * tl.cdiv(inner, BLOCK_K)):
        k = first + tl.arange(0, BLOCK_K)
        down = tap_y + i * next_y
        right = (tap_x + j * next_x) * in_channels
        there = (top + down).to(tl.uint32) < height
        place = (left + right)[:, None] + k[None, :]  # in the image's row
        inside = there[:, None] & (k < inner)[None, :] & (place.to(tl.uint32) < length)
        start = tl.multiple_of(corner + (down * length + right), ALIGN_X)
        pixels = tl.load(x + (start[:, None] + k[None, :]), mask=tl.max_constancy(inside, (1, ALIGN_X)), other=0.0)
        place = (place_y + i * next_place_y) * across + place_x + j * next_place_x
        start = tl.multiple_of(column * pitch + place * inner, ALIGN_W)
        inside = tl.max_constancy((k < inner)[:, None] & (column < columns)[None, :], (ALIGN_W, 1))
        weights = tl.load(weight + (start[None, :] + k[:, None]), mask=inside, other=0.0)
        if tiles.INTERPRETED:  # whose bfloat16 is no number
            pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(pixels, weights, total, input_precision="ieee")
        first += BLOCK_K
        done = first >= inner
        first = tl.where(done, 0, first)
        j = tl.where(done, j + 1, j)
        done = j >= count_x
        j = tl.where(done, 0, j)
        i = tl.where(done, i + 1, i)

    out_y = phase_y + row_y * out_step_y
    out_x = phase_x + column_x * out_step_x
    pixel = (image * out_height + out_y) * out_width + out_x
    live = live & (out_y < out_height) & (out_x < out_width)
    _finish_columns(
        total, shift, other, mask, y, bits, pixel, live, tile, columns, channels, groups, out_width,
        RELU, ALIGN, BLOCK_ROW, BLOCK_U, BLOCK_V,
    )  # fmt: skip


@tiles.jit("height", "width", "out_height", "out_width")
def pool_kernel(
    x,
    y,
    argmax,  # place in the window; None for means
    height,
    width,
    out_height,
    out_width,
    channels,
    units,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    start, tile = _start(tl.program_id(0), BLOCK_U, INDEX64), tl.program_id(1)
    offset, inside, _, _ = tiles.offsets_and_masks(
        start, units, tile, channels, 0, 0, True, INDEX64, ALIGN, BLOCK_U, BLOCK_V
    )
    unit = start + tl.arange(0, BLOCK_U)
    channel = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    line = unit // out_width
    left = (unit - line * out_width) * STRIDE_X - PAD_X
    image = line // out_height
    top = (line - image * out_height) * STRIDE_Y - PAD_Y
    corner = (image * height + top) * width + left
    if argmax is None:  # whose windows never stick out
        best = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
        for k in tl.range(KERNEL_Y * KERNEL_X, loop_unroll_factor=8):  # so many loads at a time
            base = tl.multiple_of((corner + k // KERNEL_X * width + k % KERNEL_X) * channels, ALIGN)
            best += tiles.load_float32(x, base[:, None] + channel[None, :], inside)
        best = tl.div_rn(best, KERNEL_Y * KERNEL_X * 1.0)
    else:
        best = tl.full((BLOCK_U, BLOCK_V), -float("inf"), tl.float32)
        best_k = tl.full((BLOCK_U, BLOCK_V), -1, tl.int32)
        for k in range(KERNEL_Y * KERNEL_X):
            row, column = top + k // KERNEL_X, left + k % KERNEL_X
            there = (unit < units) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            there = tl.max_constancy(there[:, None] & (channel < channels)[None, :], (1, ALIGN))
            base = tl.multiple_of((corner + k // KERNEL_X * width + k % KERNEL_X) * channels, ALIGN)
            v = tiles.load_float32(x, base[:, None] + channel[None, :], there)
            # PyTorch's rule: the first of equal ones, and a NaN whatever was before.
            better = there & ((v > best) | (v != v) | (best_k < 0))
            best = tl.where(better, v, best)
            best_k = tl.where(better, k, best_k)
        tl.store(argmax + offset, best_k.to(tl.uint8), mask=inside)
    tiles.store(y, offset, best, inside)


@tiles.jit("height", "width", "out_height", "out_width")
def pool_backward_kernel(
    g,
    argmax,
    other,
    mask,
    dx,
    height,
    width,
    out_height,
    out_width,
    channels,
    groups,
    units,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    INDEX64: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    start, tile = _start(tl.program_id(0), BLOCK_U, INDEX64), tl.program_id(1)
    offset, inside, byte_offset, byte_inside = tiles.offsets_and_masks(
        start, units, tile, channels, 0, groups, True, INDEX64, ALIGN, BLOCK_U, BLOCK_V
    )
    unit = start + tl.arange(0, BLOCK_U)
    channel = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    line = unit // width
    right = unit - line * width + PAD_X
    image = line // height
    bottom = line - image * height + PAD_Y
    WINDOWS_Y: tl.constexpr = (KERNEL_Y + STRIDE_Y - 1) // STRIDE_Y  # that may hold a pixel
    WINDOWS_X: tl.constexpr = (KERNEL_X + STRIDE_X - 1) // STRIDE_X
    total = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    for i in tl.range(WINDOWS_Y * WINDOWS_X, loop_unroll_factor=4):  # from the last one
        row, column = bottom // STRIDE_Y - i // WINDOWS_X, right // STRIDE_X - i % WINDOWS_X
        place_y, place_x = bottom - row * STRIDE_Y, right - column * STRIDE_X  # of the pixel, in this window
        there = (unit < units) & (row >= 0) & (row < out_height) & (place_y < KERNEL_Y)
        there = there & (column >= 0) & (column < out_width) & (place_x < KERNEL_X)
        there = tl.max_constancy(there[:, None] & (channel < channels)[None, :], (1, ALIGN))
        base = tl.multiple_of(((image * out_height + row) * out_width + column) * channels, ALIGN)
        v = tiles.load_float32(g, base[:, None] + channel[None, :], there)
        if argmax is not None:
            chosen = tl.load(argmax + (base[:, None] + channel[None, :]), mask=there, other=0).to(tl.int32)
            v = tl.where(chosen == (place_y * KERNEL_X + place_x)[:, None], v, 0.0)
        total += v
    if argmax is None:
        total = tl.div_rn(total, KERNEL_Y * KERNEL_X * 1.0)
    _finish(
        total, None, other, mask, dx, None, offset, inside, byte_offset, byte_inside, tile, channels,
        False, BLOCK_U, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _step(v, values, c, CODE: tl.constexpr, S: tl.constexpr):
    """Step ``S`` of an input program, whose four bits of ``CODE`` are its kind and a clamp's derivative at bounds."""
    KIND: tl.constexpr = (CODE >> (4 * S)) & 7
    values += 4 * S
    if KIND == 0:
        low, high = tl.load(values), tl.load(values + 1)
        v = tl.where(v < low, low, v)
        v = tl.where(v > high, high, v)
    elif KIND == 1:
        v = v + tl.load(values + c)
    elif KIND == 2:
        v = v - tl.load(values + c)
    elif KIND == 3:
        v = v * tl.load(values + c)
    else:
        v = tl.div_rn(v, tl.load(values + c))
    return v


@triton.jit
def _step_backward(d, x, values, c, CODE: tl.constexpr, S: tl.constexpr):
    """The gradient with respect to what step ``S`` took, from that with respect to what it gave."""
    KIND: tl.constexpr = (CODE >> (4 * S)) & 7
    AT_BOUNDS: tl.constexpr = (CODE >> (4 * S)) & 8
    if KIND == 0:
        for s in tl.static_range(S):
            x = _step(x, values, c, CODE, s)
        low, high = tl.load(values + 4 * S), tl.load(values + 4 * S + 1)
        if AT_BOUNDS:
            d = tl.where((x >= low) & (x <= high), d, 0.0)
        else:
            d = tl.where((x > low) & (x < high), d, 0.0)
    elif KIND == 3:
        d = d * tl.load(values + 4 * S + c)
    elif KIND == 4:
        d = tl.div_rn(d, tl.load(values + 4 * S + c))
    return d


@tiles.jit("alpha", "eps", "blocks", "height", "width", "out_height", "out_width")
def pixels_kernel(
    x,  # [N, C, H, W] float32, as clean and result
    gradient,  # channels-last, as out; None to write out alone
    clean,  # None for the gradient instead of a step
    values,  # [8, 4] float32: of each step by channel, or a clamp's bounds
    row_start,  # None where nothing is repeated
    column_start,
    nan,  # [N] int64
    result,
    out,
    alpha,
    eps,
    blocks,  # of an image
    height,
    width,
    out_height,
    out_width,
    CODE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,  # repetitions at most
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    image = image.to(tl.int64)
    if row_start is not None:
        row = pixel // width
        column = pixel - row * width
        top, left = tl.load(row_start + row, mask=inside, other=0), tl.load(column_start + column, mask=inside, other=0)
        bottom = tl.load(row_start + row + 1, mask=inside, other=0)
        right = tl.load(column_start + column + 1, mask=inside, other=0)
    count = 0
    for c in tl.static_range(CHANNELS):
        at = (image * CHANNELS + c) * (height * width) + pixel
        v = tl.load(x + at, mask=inside, other=0.0)
        if gradient is not None:
            if row_start is None:
                d = tiles.load_float32(gradient, (image * (height * width) + pixel) * CHANNELS + c, inside)
            else:
                d = tl.zeros((BLOCK,), tl.float32)
                for j in range(COLUMNS):
                    part = tl.zeros((BLOCK,), tl.float32)
                    for i in range(ROWS):
                        there = inside & (top + i < bottom) & (left + j < right)
                        copy = (image * out_height + (top + i)) * out_width + (left + j)
                        part += tiles.load_float32(gradient, copy * CHANNELS + c, there)
                    d += part
            for s in tl.static_range(STEPS):
                d = _step_backward(d, v, values, c, CODE, STEPS - 1 - s)
            if clean is None:
                tl.store(result + at, d, mask=inside)
            else:
                center = tl.load(clean + at, mask=inside, other=0.0)
                low, high = center - eps, center + eps
                moved = v + alpha * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
                moved = tl.where(moved < low, low, moved)
                moved = tl.where(moved > high, high, moved)
                moved = tl.where(center == center, moved, center)
                moved = tl.where(moved < 0, 0.0, moved)
                moved = tl.where(moved > 1, 1.0, moved)
                bad = d != d
                v = tl.where(bad, v, moved)
                count += tl.sum((bad & inside).to(tl.int32), 0)
                tl.store(result + at, v, mask=inside)
        if out is not None:
            for s in tl.static_range(STEPS):
                v = _step(v, values, c, CODE, s)
            if row_start is None:
                tiles.store(out, (image * (height * width) + pixel) * CHANNELS + c, v, inside)
            else:
                for i in range(ROWS):
                    for j in range(COLUMNS):
                        there = inside & (top + i < bottom) & (left + j < right)
                        copy = (image * out_height + (top + i)) * out_width + (left + j)
                        tiles.store(out, copy * CHANNELS + c, v, there)
    if nan is not None:
        if count > 0:
            tl.atomic_add(nan + image, count.to(tl.int64))


def pointwise(
    x: Tensor,
    y: Tensor,
    size: tuple[int, int],
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    mask: Tensor | None = None,
    bits: Tensor | None = None,
) -> None:
    """y = (x where ``gate`` is 1) * scale + shift + other, then ReLU with its ``bits``, or 0 where ``mask`` is.

    Args:
        size: pixels and channels.
    """
    sizes, blocks, grid = _tiled(y, *size)
    with tiles.on_device_of(y):
        pointwise_kernel[grid](
            x, gate, scale, shift, other, mask, y, bits, **sizes, RELU=bits is not None, **blocks, num_warps=4
        )  # fmt: skip


def convolution_configs(capability: tuple[int, int]) -> list[ConvolutionConfig]:
    """What a device may choose from: before 9.0, larger tiles do not fit its registers."""
    return [c for c in CONVOLUTION_CONFIGS if capability >= (9, 0) or c.rows * c.width <= 128 * 128]


def fitted(config: ConvolutionConfig, product: Product) -> ConvolutionConfig:
    """The configuration without what would only be filled up."""
    columns, _, _, inner = product.weight.shape
    width, inner = (max(16, tiles.power_of_2(n)) for n in (columns, inner))
    return config._replace(width=min(config.width, width), inner=min(config.inner, inner))


def convolution(
    x: Tensor,
    y: Tensor,
    product: Product,
    config: ConvolutionConfig,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    mask: Tensor | None = None,
    bits: Tensor | None = None,
) -> None:
    """y = the product of x, finished as by :func:`pointwise`; without all of that if it is of blocks."""
    images, in_channels, height, width = x.shape
    channels, out_height, out_width = y.shape[1:]
    columns, down, across, inner = product.weight.shape
    config = fitted(config, product)
    row = product.block_row
    rows = [tiles.ceil_div(n, step) for n, step in zip((out_height, out_width), product.out_step, strict=True)]
    units, channel_tiles = images * rows[0] * rows[1], tiles.ceil_div(columns, config.width)
    phases_y, phases_x = product.phases
    with tiles.on_device_of(y):
        convolution_kernel[(tiles.ceil_div(units, config.rows) * phases_y * phases_x * channel_tiles,)](
            x,
            product.weight,
            product.taps,
            shift,
            other,
            mask,
            y,
            bits,
            in_channels,
            height,
            width,
            inner,
            across,
            down * across * inner,
            phases_y,
            phases_x,
            *rows,
            *product.in_step,
            *product.out_step,
            out_height,
            out_width,
            channel_tiles,
            columns,
            channels,
            tiles.ceil_div(channels, 8),
            units,
            RELU=bits is not None,
            INDEX64=max(x.numel(), y.numel()) >= tiles.INDEX64_FROM,
            ALIGN=gcd(channels if row == 0 else gcd(row, out_width * channels), 16),
            ALIGN_X=product.in_align,
            ALIGN_W=gcd(inner, 16),
            BLOCK_ROW=row,
            BLOCK_U=config.rows,
            BLOCK_V=config.width,
            BLOCK_K=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def pool(x: Tensor, y: Tensor, window: tuple[int, ...], argmax: Tensor | None) -> None:
    """Maxima of windows and where they are, or means without ``argmax``.

    Args:
        window: images, channels, height, width, results' height and width, kernel, stride, padding (of maxima).
    """
    images, channels, _, _, height, width = window[:6]
    sizes, blocks, grid = _tiled(y, images * height * width, channels)
    del sizes["groups"]
    blocks["INDEX64"] |= x.numel() >= tiles.INDEX64_FROM
    with tiles.on_device_of(y):
        pool_kernel[grid](x, y, argmax, **_window(window), **sizes, **blocks, num_warps=4)


def pool_backward(
    g: Tensor, dx: Tensor, window: tuple[int, ...], argmax: Tensor | None, other: Tensor | None, mask: Tensor | None
) -> None:
    """The input gradient of :func:`pool`, plus ``other``, 0 where the bits of ``mask`` are."""
    images, channels, height, width = window[:4]
    sizes, blocks, grid = _tiled(dx, images * height * width, channels)
    blocks["INDEX64"] |= g.numel() >= tiles.INDEX64_FROM
    with tiles.on_device_of(dx):
        pool_backward_kernel[grid](g, argmax, other, mask, dx, **_window(window), **sizes, **blocks, num_warps=4)


def pixels(
    x: Tensor,
    values: Tensor,
    codes: list[int],
    tables: Tables | None,
    gradient: Tensor | None = None,
    clean: Tensor | None = None,
    nan: Tensor | None = None,
    result: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 0.0,
    eps: float = 0.0,
) -> None:
    """The pixel step into ``result`` and ``out``; the gradient alone without ``clean``; ``out`` alone without either.

    Args:
        values, codes: of the input program: per step its kind's index in ``KINDS``, plus 8 if a clamp passes
            gradients at its bounds.
    """
    images, channels, height, width = x.shape
    block = 256 if x.device.type != "cpu" else 32
    blocks = tiles.ceil_div(height * width, block)
    with tiles.on_device_of(x):
        pixels_kernel[(images * blocks,)](
            x,
            gradient,
            clean,
            values,
            tables and tables.row_start,
            tables and tables.column_start,
            nan,
            result,
            out,
            float(alpha),
            float(eps),
            blocks,
            height,
            width,
            *(tables.size if tables else (height, width)),
            CODE=sum(code << 4 * i for i, code in enumerate(codes)),
            STEPS=len(codes),
            CHANNELS=channels,
            ROWS=tables.most[0] if tables else 1,
            COLUMNS=tables.most[1] if tables else 1,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,  # rounded as PyTorch does, after every operation
        )


def _tiled(y: Tensor, units: int, channels: int) -> tuple[dict, dict, tuple[int, int]]:
    """Sizes, block sizes and grid of a kernel over [units, channels]."""
    most, values = (64, 2048) if y.device.type != "cpu" else (16, 256)  # small in the interpreter: several tiles
    width = min(most, max(8, tiles.power_of_2(channels)))
    align = gcd(channels, 16)
    rows = (values if align >= 8 else values // 2) // width  # more addresses are held at a time
    sizes = dict(channels=channels, groups=tiles.ceil_div(channels, 8), units=units)
    blocks = dict(INDEX64=units * channels >= tiles.INDEX64_FROM, ALIGN=align, BLOCK_U=rows, BLOCK_V=width)
    return sizes, blocks, (tiles.ceil_div(units, rows), tiles.ceil_div(channels, width))


def _window(window: tuple[int, ...]) -> dict:
    _, _, height, width, out_height, out_width, kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x = window
    return dict(
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        KERNEL_Y=kernel_y,
        KERNEL_X=kernel_x,
        STRIDE_Y=stride_y,
        STRIDE_X=stride_x,
        PAD_Y=pad_y,
        PAD_X=pad_x,
    )
