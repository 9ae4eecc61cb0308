"""A function as a CUDA graph: run as it is and captured, then replayed on new inputs."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twins_fast.attacks.engine.memory import out_of_memory
from twins_fast.attacks.engine.nodes import in_one_line
from twins_fast.devices import capturing, has_graphs
from twins_fast.kernels.capture import abandon
from twins_fast.nn.guards import random_numbers_restored

KEPT = 4  # graphs
RESTLESS = 8  # captures in a row, without a replay, after which nothing is captured any more

Function = Callable[..., tuple[Tensor, ...]]  # launches everything, and reads nothing back

_this_thread = threading.local()  # .prepares: whether a function runs that will be captured as a whole


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
    owners: Any


class Graphs:
    """The graphs of one function, which share their working memory: one call runs at a time, on any stream.

    A call of a new kind runs the function as it is, then captures it for the calls to come, so that nothing is computed
    twice; the run allocates, compiles and measures, which is forbidden during a capture. A capture that lacks memory is
    tried again after the next such run. Any other error ends all captures.

    Attributes:
        reason: why the last call ran without a graph, and the next one of its kind will; empty if there is one.

    Args:
        device: where the function runs.
        what: its name in warnings.
    """

    def __init__(self, device: torch.device, what: str):
        self.device = device
        self.reason = ""
        self._what = what
        self._captured: OrderedDict[Hashable, Captured | str] = OrderedDict()  # or why there is no memory for it
        self._off = ""  # why nothing is captured any more
        self._unused = 0  # captures since the last replay
        self._side: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None  # memory of all graphs: results are copied before the next replay
        self._done: torch.cuda.Event | None = None  # when the last call has ended

    def __call__(
        self,
        key: Callable[[], Hashable],
        function: Function,
        inputs: tuple[Tensor, ...],
        keep: Callable[[], Any],
        shrink: Callable[[], bool],
        check: Callable[[Any], None] = lambda owners: None,
    ) -> tuple[Tensor, ...]:
        """``function(*inputs)``, by a replay where it has been captured; inside a larger capture, a part of that.

        Args:
            key: all that the function depends on besides values of tensors and the layout of ``inputs``.
            keep: called after a capture; what it returns lives as long as the graph.
            shrink: called when memory ran out in a capture; frees some, or returns False.
            check: called before a replay with what ``keep`` has returned.
        """
        if not has_graphs(self.device) or capturing(self.device):
            return function(*inputs)
        with self.in_turn():
            self.reason = self._off
            if self._off or getattr(_this_thread, "prepares", False):
                return function(*inputs)
            layout = tuple((tuple(t.shape), t.stride(), t.dtype) for t in inputs)
            known = (key(), layout)
            if known in self._captured:
                self._captured.move_to_end(known)
                captured = self._captured[known]
                if isinstance(captured, str):
                    self.reason = captured
                    return function(*inputs)
                check(captured.owners)
                return self._replay(captured, inputs)
            results = self._run_aside(function, inputs)
            known = (key(), layout)  # the first run may have made what the others use, such as an optimiser's state
            if known not in self._captured:
                self._capture(known, function, inputs, keep, shrink)
            return results

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Orders what runs inside the block, captured or not, after what ran so before, on whatever stream."""
        if not has_graphs(self.device) or capturing(self.device):
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def clear(self) -> bool:
        """Drop all graphs, before their memory is freed; whether there were any."""
        if capturing(self.device):
            raise RuntimeError("memory cannot be freed while a CUDA graph is captured")
        dropped = any(isinstance(captured, Captured) for captured in self._captured.values())
        if dropped:
            torch.cuda.synchronize(self.device)  # one may still run
        self._captured.clear()
        return dropped

    def _run_aside(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On the stream of the captures, so that what the run sets up is there for them."""
        stream = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(stream)
        try:
            _this_thread.prepares = True
            with torch.cuda.stream(self._side):
                return function(*inputs)
        finally:
            _this_thread.prepares = False
            stream.wait_stream(self._side)

    def _replay(self, captured: Captured, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._unused = 0
        for ours, theirs in zip(captured.inputs, inputs, strict=True):
            ours.copy_(theirs)
        captured.graph.replay()
        return tuple(t.clone() for t in captured.results)

    def _capture(
        self,
        known: Hashable,
        function: Function,
        inputs: tuple[Tensor, ...],
        keep: Callable[[], Any],
        shrink: Callable[[], bool],
    ) -> None:
        self._unused += 1
        if self._unused > RESTLESS:
            return self._stop("what it depends on changes from call to call")
        stream = torch.cuda.current_stream()
        failure, lacks_memory, graph = "", False, torch.cuda.CUDAGraph()
        try:
            ours = tuple(t.clone() for t in inputs)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            # Other threads, such as those that load data, may keep calling CUDA.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local")
            with random_numbers_restored() as drawn, capture:
                try:
                    results = function(*ours)
                except Exception as error:  # looked at here: the end of the capture then fails for another reason
                    failure, lacks_memory = in_one_line(error), out_of_memory(error)
                    raise
            if drawn:
                failure = f"it draws random numbers on the CPU ({', '.join(drawn)})"
            elif not all(isinstance(t, Tensor) for t in results):
                failure = "a result of it is not a tensor"
        except Exception as error:  # of any type; without a graph the function is the same, only slower
            failure, lacks_memory = failure or in_one_line(error), lacks_memory or out_of_memory(error)
            abandon(graph, stream.device_index, self._pool)
        finally:
            torch.cuda.set_stream(stream)  # a failed capture may not have put it back
        if lacks_memory:
            self.reason = failure
            if not shrink():
                self._keep(known, failure)
                warnings.warn(f"the {self._what} runs without a CUDA graph: {failure}", stacklevel=6)
        elif failure:
            self._stop(failure)
        else:
            self._keep(known, Captured(graph, ours, results, keep()))

    def _keep(self, known: Hashable, captured: Captured | str) -> None:
        self._captured[known] = captured
        if len(self._captured) > KEPT:
            torch.cuda.synchronize(self.device)  # it may still run
            self._captured.popitem(last=False)

    def _stop(self, reason: str) -> None:
        self.reason = self._off = reason
        self.clear()
        warnings.warn(f"the {self._what} runs without a CUDA graph: {reason}", stacklevel=7)
