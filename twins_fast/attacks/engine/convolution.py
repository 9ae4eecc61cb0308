"""The geometry of a convolution, and each of its axes as phases of a small convolution, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple


class Sizes(NamedTuple):
    """Height and width of a pooling's operand and result."""

    in_size: tuple[int, int]
    out_size: tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution of an image that was upsampled ``upsample`` times (nearest neighbour).

    Attributes:
        padding: in front; behind the image there is as much as ``out_size`` needs.
    """

    in_channels: int
    in_size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: tuple[int, int] = (1, 1)

    @property
    def padding_behind(self) -> tuple[int, ...]:
        """Negative where the last rows or columns are not looked at."""
        sizes = zip(self.in_size, self.upsample, self.out_size, self.kernel, self.stride, self.dilation, strict=True)
        needed = [(out - 1) * s + d * (k - 1) + 1 - size * f for size, f, out, k, s, d in sizes]
        return tuple(n - p for n, p in zip(needed, self.padding, strict=True))

    @property
    def pads_alike(self) -> bool:
        """Whether PyTorch pads so, given :attr:`padding` alone."""
        lost = [p - behind for p, behind in zip(self.padding, self.padding_behind, strict=True)]
        return all(0 <= n < s for n, s in zip(lost, self.stride, strict=True))

    @property
    def apart(self) -> tuple[int, ...]:
        """The stride; for a single result, where any would do, so large that no pixel sees two taps."""
        if (self.out_size, self.upsample) != ((1, 1), (1, 1)):
            return self.stride
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def weights(self) -> int:
        return self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @property
    def operations(self) -> int:
        """Multiplications and additions for one image, without the upsampling's repetition."""
        kernel = prod(min(k, -(-(k - 1) // f) + 1) for k, f in zip(self.kernel, self.upsample, strict=True))
        return 2 * prod(self.out_size) * self.out_channels * self.in_channels // self.groups * kernel


def axis_forward(kernel: int, stride: int, padding: int, dilation: int, factor: int) -> tuple[int, int, list]:
    """A convolution along one axis over an image that was upsampled ``factor`` times.

    Returns:
        (in_step, out_step, phases): output ``phase + i * out_step`` reads the small image at ``i * in_step + tap``
        for each (tap, kernel indices) of the phase's list.
    """
    out_step = factor // gcd(stride, factor)
    phases = []
    for phase in range(out_step):
        taps: dict[int, list[int]] = {}
        for k in range(kernel):
            taps.setdefault((phase * stride - padding + k * dilation) // factor, []).append(k)
        phases.append(sorted(taps.items()))
    return out_step * stride // factor, out_step, phases


def axis_backward(kernel: int, stride: int, padding: int, dilation: int, factor: int) -> tuple[int, int, list]:
    """The input gradient of :func:`axis_forward`, as a convolution over the output's gradient, in the same form."""
    out_step = stride // gcd(stride, factor)
    phases = []
    for phase in range(out_step):
        taps: dict[int, list[int]] = {}
        for k in range(kernel):
            # Output o reads the upsampled image at o * stride - padding + k * dilation.
            low = factor * phase + padding - k * dilation
            for o in range(-(-low // stride), (low + factor - 1) // stride + 1):
                taps.setdefault(o, []).append(k)
        phases.append(sorted(taps.items()))
    return factor * out_step // stride, out_step, phases


def axis_blocks(
    times: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[int, int, list[int], list[list]]:
    """The input gradient along one axis, of whole blocks of pixels at a time.

    Returns:
        pixels in the block, outputs per block, offsets of the outputs that read the block, and for each pixel the
        kernel index with which each of these reads it, or None.
    """
    block = times * (stride if stride > 1 else 2)
    _, _, phases = axis_backward(kernel, stride, padding, dilation, 1)
    seen = [{tap + pixel // stride: ks[0] for tap, ks in phases[pixel % stride]} for pixel in range(block)]
    offsets = sorted(set().union(*seen))
    return block, block // stride, offsets, [[pixel.get(offset) for offset in offsets] for pixel in seen]
