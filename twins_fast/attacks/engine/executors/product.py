"""Both directions of a convolution as the Triton kernel takes them: taps in phases, weights in their order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.attacks.engine.convolution import Convolution, axis_backward, axis_blocks, axis_forward
from twins_fast.kernels import attack

READING = 128  # columns that are multiplied while a tap is read: 24 bytes a clock, 1500 products; an estimate


class Axis(NamedTuple):
    """One axis of a direction.

    Attributes:
        in_step, out_step, phases: see ``attack.Product``, whose ``taps`` the phases are.
        places: of [pixel of a block][place of weights][pixel of a tap]: the kernel indices that are summed up.
    """

    in_step: int
    out_step: int
    phases: list[tuple[int, int, int, int, int]]
    places: list[list[list[list[int]]]]


class Direction:
    """One direction of a convolution; ``product`` has the weights of the last :meth:`pack`."""

    product: attack.Product

    def __init__(
        self, geometry: Convolution, backward: bool, axes: tuple[Axis, Axis], blocks: bool, device: torch.device
    ):
        g, (y, x) = geometry, axes
        channels, width = (g.out_channels, g.out_size[1]) if backward else (g.in_channels, g.in_size[1])
        self._order = (2, 3, 1, 4, 5, 6, 0) if backward else (2, 3, 0, 4, 5, 6, 1)
        self._plain = all(axis.places == _in_order(kernel) for axis, kernel in zip(axes, g.kernel, strict=True))
        down, across = (_indices(axis.places, kernel).to(device) for axis, kernel in zip(axes, g.kernel, strict=True))
        self._indices = down[:, None, :, None, :, :, None], across[None, :, None, :, :, None, :]
        starts = [number for _, tap, step, _, _ in x.phases for number in (tap, step)]
        self._weight: Tensor | None = None
        self._options = dict(
            taps=torch.tensor([*y.phases, *x.phases], dtype=torch.int32, device=device),
            phases=(len(y.phases), len(x.phases)),
            in_step=(y.in_step, x.in_step),
            out_step=(y.out_step, x.out_step),
            in_align=gcd(16, channels * across.shape[2], channels * gcd(x.in_step, width, *starts)),
            block_row=x.out_step * g.in_channels if blocks else 0,
        )

    def pack(self, weight: Tensor) -> None:
        """Take over the weights [O, I, kh, kw], channels-last in memory."""
        if self._plain:
            packed = weight[:, :, None, None, :, :, None]
        else:
            with_zeros = F.pad(weight.float(), (0, 1, 0, 1))
            packed = with_zeros[(..., *self._indices)].sum((-2, -1))
        # [pixels of a block: down, across; columns; places: down, across; pixels of a tap; its channels]
        packed = packed.permute(self._order).flatten(5).flatten(0, 2)
        if self._weight is None:
            self._weight = packed.to(weight.dtype).contiguous()  # if it is that already, the very same memory
            self.product = attack.Product(self._weight, **self._options)
        elif self._weight.data_ptr() != weight.data_ptr():
            self._weight.copy_(packed)


def directions(geometry: Convolution, device: torch.device) -> tuple[Direction | None, Direction | None]:
    """Forward and backward; None where the kernel would not move whole vectors, or has no groups."""
    g = geometry
    few = g.in_channels <= attack.MOST_CHANNELS  # an image
    if g.groups > 1 or g.out_channels % 8 or (g.in_channels % 8 and not few):
        return None, None
    numbers = list(zip(g.kernel, g.apart, g.padding, g.dilation, g.upsample, strict=True))
    down, across = (_phased(axis_forward, *each) for each in numbers)
    if few:
        across = _rows(*axis_forward(*numbers[1]), g.in_size[1])
    blocks = _blocks(g) if few and g.upsample == (1, 1) and g.out_size != (1, 1) else None
    back = blocks or tuple(_phased(axis_backward, *each) for each in numbers)
    return Direction(g, False, (down, across), False, device), Direction(g, True, back, blocks is not None, device)


def _in_order(kernel: int) -> list[list[list[list[int]]]]:
    return [[[[k]] for k in range(kernel)]]


def _phased(axis: Callable, kernel: int, stride: int, padding: int, dilation: int, factor: int) -> Axis:
    """Evenly spaced taps of one pixel each."""
    in_step, out_step, phases = axis(kernel, stride, padding, dilation, factor)
    if factor == 1:  # every tap has one kernel index, and every index belongs to one tap
        spaced = [[(tap, k) for tap, (k,) in taps] for taps in phases]
        return Axis(in_step, out_step, [_progression(taps) for taps in spaced], _in_order(kernel))
    spaced, places = [], []
    for taps in phases:
        filled = range(taps[0][0], taps[-1][0] + 1) if taps else range(0)
        spaced.append([(tap, len(places) + i) for i, tap in enumerate(filled)])
        places += [[dict(taps).get(tap, [])] for tap in filled]
    return Axis(in_step, out_step, [_progression(taps) for taps in spaced], [places])


def _progression(taps: list[tuple[int, int]]) -> tuple[int, int, int, int, int]:
    """Evenly spaced (tap, place) as a row of ``attack.Product.taps``."""
    if not taps:
        return 0, 0, 0, 0, 0
    (tap, place), (next_tap, next_place) = taps[0], taps[min(1, len(taps) - 1)]
    step, next_step = next_tap - tap, next_place - place
    assert taps == [(tap + i * step, place + i * next_step) for i in range(len(taps))]
    return len(taps), tap, step, place, next_step


def _rows(in_step: int, out_step: int, phases: list, width: int) -> Axis:
    """One tap per phase: all pixels that it sees of a row, from where loads are as wide as they can be."""
    unit = in_step if width % in_step == 0 else 1
    firsts = [taps[0][0] // unit * unit for taps in phases]
    length = max(taps[-1][0] - first + 1 for taps, first in zip(phases, firsts, strict=True))
    length = -(-length // unit) * unit
    places = [
        [dict(taps).get(first + i, []) for i in range(length)] for taps, first in zip(phases, firsts, strict=True)
    ]
    return Axis(in_step, out_step, [(1, first, 0, place, 0) for place, first in enumerate(firsts)], [places])


def _blocks(g: Convolution) -> tuple[Axis, Axis] | None:
    """Blocks of pixels as columns, so that few channels fill a product; None if none divides the image."""
    axes = zip(g.in_size, g.kernel, g.stride, g.padding, g.dilation, strict=True)
    candidates = [
        [axis for axis in (_block(times, *numbers) for times in (1, 2)) if size % axis.out_step == 0]
        for size, *numbers in axes
    ]

    def time(axes: tuple[Axis, Axis]) -> float:  # of a pixel
        pixels, taps = (a * b for a, b in zip(*((axis.out_step, len(axis.places[0])) for axis in axes), strict=True))
        return taps * (READING + pixels * g.in_channels) / pixels

    return min(product(*candidates), key=time, default=None)


def _block(times: int, *numbers: int) -> Axis:
    block, outputs, offsets, seen = axis_blocks(times, *numbers)
    taps = range(offsets[0], offsets[-1] + 1)
    pixels = [dict(zip(offsets, pixel, strict=True)) for pixel in seen]
    places = [[[[] if pixel.get(tap) is None else [pixel[tap]]] for tap in taps] for pixel in pixels]
    return Axis(outputs, block, [(len(taps), taps[0], 1, 0, 1)], places)


def _indices(places: list[list[list[list[int]]]], kernel: int) -> Tensor:
    """[pixels of a block, places, pixels of a tap, summands]; what is missing is ``kernel``, a place of zeros."""
    most = max(len(ks) for pixel in places for place in pixel for ks in place)
    return torch.tensor([[[ks + [kernel] * (most - len(ks)) for ks in tap] for tap in pixel] for pixel in places])
