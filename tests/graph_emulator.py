"""CUDA graphs on CPU tensors: a capture records every ATen operation and takes back what it did, a replay repeats them.

Results of a replay are written into the memory of those of the capture, so that whatever was baked into the graph (a
learning rate as a number, a batch, random numbers) shows as a wrong value. As on a device, a capture refuses to read
values on the host and to wait, and an error in it spoils its end. What is called through pointers, as the C++ kernels
are, cannot be recorded. Operations that draw from PyTorch's generator draw again in a replay.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twins_fast import devices
from twins_fast.kernels import capture

READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::_unique2",
    "aten::masked_select",
}  # fmt: skip


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> Tensor:
    """All of its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class Recorder(TorchDispatchMode):
    """Runs what it records, on tensors whose values it will put back."""

    def __init__(self, graph: Graph, device: Device):
        super().__init__()
        self.graph, self.device = graph, device
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of memory from outside: a view of its bytes, and a copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in READS:
            self.device.refuse(func._schema.name)
        if self.device.launches_left is not None:
            if self.device.launches_left == 0:
                self.device.launches_left = None
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            self.device.launches_left -= 1
        for t in tensors_in((args, kwargs)):
            if memory_of(t) not in self.graph.made and memory_of(t) not in self.before:
                self.before[memory_of(t)] = bytes_of(t), bytes_of(t).clone()
        results = func(*args, **kwargs)
        inputs = {memory_of(t) for t in tensors_in((args, kwargs))}
        new = [t for t in tensors_in(results) if memory_of(t) not in inputs]
        self.graph.made |= {memory_of(t) for t in new}
        self.graph.operations.append((func, args, kwargs, results))
        return results

    def take_back(self) -> None:
        """Values as they were before the capture; what it made holds nothing of use until a replay."""
        for flat, copy in self.before.values():
            flat.copy_(copy)
        for _, _, _, results in self.graph.operations:
            for t in tensors_in(results):
                if memory_of(t) in self.graph.made:
                    bytes_of(t).fill_(255)  # NaN, for one


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    device: Device

    def __init__(self):
        self.operations = []
        self.made: set[int] = set()  # memory that belongs to it; the operations keep it alive

    @torch.no_grad()
    def replay(self) -> None:
        assert not self.device.capturing
        self.device.replays += 1
        for func, args, kwargs, recorded in self.operations:
            inputs = {memory_of(t) for t in tensors_in((args, kwargs))}
            views = [memory_of(t) in inputs for t in tensors_in(recorded)]
            if views and all(views) and not func._schema.is_mutable:
                continue
            results = func(*args, **kwargs)
            for old, new, view in zip(tensors_in(recorded), tensors_in(results), views, strict=True):
                if not view:
                    old.copy_(new)


class Stream:
    device: Device
    device_index = 0

    def wait_stream(self, other: Stream) -> None:
        self.device.log.append((self, "waits for", other))

    def wait_event(self, event: Event) -> None:
        if self.device.capturing:
            self.device.refuse("a wait for an event from outside")
        self.device.log.append((self, "waits for", event))

    def synchronize(self) -> None:
        self.device.wait()


class Event:
    device: Device

    def record(self, stream: Stream) -> None:
        self.device.log.append((stream, "records", self))

    def synchronize(self) -> None:
        self.device.wait()


class Device:
    """Stands in for torch.cuda, and makes CPU tensors eligible for graphs.

    Attributes:
        captures, replays: counted.
        ended: pools that the allocator has been told of, after a capture that failed.
        launches_left: operations in captures until memory runs out, once; None for never.
        log: (stream, what it does, event or stream).
        stream: the current one.
    """

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        self.ended: list[tuple[int, int]] = []
        self.launches_left: int | None = None
        self.log: list[tuple] = []
        self.graph: Graph | None = None  # under capture
        self.error = ""
        for kind in (Graph, Stream, Event):
            kind.device = self
        self.stream = Stream()

        monkeypatch.setattr(devices, "GRAPH_DEVICES", ("cuda", "cpu"))
        for name, value in {
            "CUDAGraph": Graph, "Stream": Stream, "Event": Event, "graph": self._capture, "stream": self._on_stream,
            "device": self._nothing, "current_stream": lambda: self.stream, "set_stream": self._set_stream,
            "synchronize": self.wait, "graph_pool_handle": lambda: (0, 1),
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, capture.END_OF_POOL, lambda _, pool: self.ended.append(pool), raising=False)

    @property
    def capturing(self) -> bool:
        return self.graph is not None

    def refuse(self, what: str) -> None:
        self.error = f"{what}: operation not permitted when stream is capturing"
        raise RuntimeError(self.error)

    def wait(self, *_) -> None:
        if self.capturing:
            self.refuse("a wait")

    def _set_stream(self, stream: Stream) -> None:
        self.stream = stream

    @contextmanager
    def _nothing(self, *_):
        yield

    @contextmanager
    def _on_stream(self, stream: Stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _capture(self, graph: Graph, pool, stream: Stream, capture_error_mode: str):
        assert not self.capturing and capture_error_mode == "thread_local" and pool
        self.wait()
        self.captures += 1
        self.graph, self.error, self.stream, before = graph, "", stream, self.stream
        recorder = Recorder(graph, self)
        try:
            with recorder:
                yield
        finally:
            self.graph = None
            recorder.take_back()
            if self.error:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = before  # as in PyTorch: not after an error
