"""An attack as a CUDA graph: captured once, replayed on new images with the current parameters.

Not yet run on a GPU.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 4  # graphs

Attack = Callable[..., tuple[Tensor, ...]]  # launches everything, and reads nothing back


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes.

    Attributes:
        inputs, results: the tensors at the addresses that the graph reads and writes.
        owners: keep other memory alive that it uses.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    owners: object


class GraphedAttack:
    """The graphs of one program, whose working memory they share: one attack runs at a time, on any stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._side: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None  # when the last attack has ended

    def __call__(
        self, key: Hashable, attack: Attack, inputs: tuple[Tensor, ...], keep: Callable[[], object]
    ) -> tuple[Tensor, ...] | None:
        """``attack(*inputs)``; None, with a warning, if it cannot be captured.

        Args:
            key: all that the attack depends on besides values of tensors and the shapes of ``inputs``.
            keep: called after the capture; what it returns lives as long as the graph.
        """
        key = (key, *((tuple(t.shape), t.dtype) for t in inputs))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            captured = self._captured.get(key)
            if captured is None:
                captured = self._capture(attack, inputs, keep)
                if captured is None:
                    return None
                self._captured[key] = captured
                if len(self._captured) > KEPT:
                    torch.cuda.synchronize()
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            for ours, theirs in zip(captured.inputs, inputs, strict=True):
                ours.copy_(theirs)
            captured.graph.replay()
            results = tuple(t.clone() for t in captured.results)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        return results

    def clear(self) -> None:
        """Drop all graphs, before their memory is freed."""
        if self._captured:
            torch.cuda.synchronize(self._device)  # one may still run
            self._captured.clear()

    def _capture(self, attack: Attack, inputs: tuple[Tensor, ...], keep: Callable[[], object]) -> Captured | None:
        ours = tuple(t.clone(memory_format=torch.contiguous_format) for t in inputs)
        stream = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            attack(*ours)  # allocates, compiles and measures, which is forbidden during a capture
        stream.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()  # with a memory pool of its own
        try:
            # Other threads, such as those that load data, may keep calling CUDA.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                results = attack(*ours)
        except Exception as error:  # of any type; without a graph the attack is the same, only slower
            warnings.warn(f"the attack runs without a CUDA graph: {error}", stacklevel=6)
            return None
        finally:
            torch.cuda.set_stream(stream)  # a failed capture may not have put it back
        return Captured(graph, ours, results, keep())
