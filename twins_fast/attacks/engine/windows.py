"""The windows of pooling, upsampling, padding and cropping along one axis."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """For each result where its window begins and ends, inside of the image, and what the sum over it is multiplied by.

    Neither goes back from one result to the next; a window may be empty. What results from an image is summed over the
    windows of both axes.
    """

    size: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    weight: tuple[float, ...]

    @property
    def regular(self) -> tuple[int, int] | None:
        """Kernel and stride of a plain mean; None of anything else."""
        kernel = self.end[0] - self.begin[0]
        stride = self.begin[1] if len(self.begin) > 1 else self.size
        results = (self.size - kernel) // stride + 1 if kernel > 0 < stride else 0
        plain = [(i * stride, i * stride + kernel) for i in range(results)]
        means = set(self.weight) == {1 / kernel} if results else False
        return (kernel, stride) if means and list(zip(self.begin, self.end, strict=True)) == plain else None

    def matrix(self, device: torch.device) -> Tensor:
        """float32 [results, size]."""
        places = torch.arange(self.size, device=device)
        begin, end = (torch.tensor(ends, device=device)[:, None] for ends in (self.begin, self.end))
        inside = (begin <= places) & (places < end)
        return inside * torch.tensor(self.weight, dtype=torch.float32, device=device)[:, None]


def pooled(size: int, results: int, kernel: int, stride: int, padding: int, counts_padding: bool) -> Windows:
    """Of means, which may count the padding, but nothing beyond it."""
    begin = [i * stride - padding for i in range(results)]
    end = [min(b + kernel, size + padding) for b in begin]
    inside = [(max(b, 0), min(e, size)) for b, e in zip(begin, end, strict=True)]
    counted = zip(begin, end, strict=True) if counts_padding else inside
    return Windows(size, *zip(*inside, strict=True), tuple(1 / (e - b) for b, e in counted))


def adaptive(size: int, results: int) -> Windows:
    """Of means over windows that are as alike as can be."""
    begin = [i * size // results for i in range(results)]
    end = [-(-(i + 1) * size // results) for i in range(results)]
    return Windows(size, tuple(begin), tuple(end), tuple(1 / (e - b) for b, e in zip(begin, end, strict=True)))


def copied(size: int, sources: list[int]) -> Windows:
    """Of copies: each result shows one of ``sources``."""
    return Windows(size, tuple(sources), tuple(i + 1 for i in sources), (1.0,) * len(sources))


def moved(size: int, results: int, first: int, step: int = 1) -> Windows:
    """Of copies of every ``step``-th place from ``first`` on; zeros outside of the image."""
    places = [first + i * step for i in range(results)]
    begin = [min(max(place, 0), size) for place in places]
    return Windows(
        size, tuple(begin), tuple(b + (0 <= p < size) for b, p in zip(begin, places, strict=True)), (1.0,) * results
    )
