"""Memory, pointers and layouts that the tests of the compiled kernels share."""

import torch
import torch.nn.functional as F

from twins_fast.ops.native import _C

ISAS = getattr(_C, "cpu_isas", [])
MARGIN = 64  # bytes around a result that must stay as they are


class Result:
    """Memory for a result, full of NaN, between margins that must not change."""

    def __init__(self, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        self.memory = torch.full((size + 2 * MARGIN,), 0xFF, dtype=torch.uint8)
        self.tensor = self.memory[MARGIN : MARGIN + size].view(dtype).view(shape)

    def get(self):
        assert (self.memory[:MARGIN] == 0xFF).all() and (self.memory[-MARGIN:] == 0xFF).all()
        return self.tensor


class Pointer(int):
    """An address that keeps its tensor alive; 0 for None."""

    def __new__(cls, tensor):
        self = super().__new__(cls, 0 if tensor is None else tensor.data_ptr())
        self.tensor = tensor
        return self


def pointers(*tensors):
    return [Pointer(t) for t in tensors]


def pack(mask):
    """[pixels, channels] booleans as bits."""
    padded = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).int()
    return (padded << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack(bits, channels):
    """Bits [..., bytes] as booleans [..., channels], and whether those past the channels are 0."""
    unpacked = (bits[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2).bool()
    return unpacked[..., :channels], not unpacked[..., channels:].any()


def last(images):
    """[images, channels, height, width] as the kernels see it."""
    return images.permute(0, 2, 3, 1).contiguous()


def first(images):
    """The inverse of :func:`last`, as a view."""
    return images.permute(0, 3, 1, 2)
