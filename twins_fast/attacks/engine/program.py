"""A plan with its memory: one arena, a batch in chunks, steps bound to their tensors."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.cuda_graph import Function, Graphs
from twins_fast.attacks.engine.executors.segment import Segment
from twins_fast.attacks.engine.executors.torch import State, TorchExecutor
from twins_fast.attacks.engine.fold import Fold
from twins_fast.attacks.engine.memory import out_of_memory, place
from twins_fast.attacks.engine.nodes import Node
from twins_fast.attacks.engine.plan import Plan
from twins_fast.devices import capturing

ALIGN = 64  # bytes: where every tensor of the arena starts
CACHED = 32 << 20  # bytes of arena that a chunk may take: what stays in a CPU's last-level cache
LARGEST_EXPONENT = 126  # of a power of two in float32, or nearly
KEPT_SIZES = 8  # chunk sizes with bound tensors


@dataclass
class Bound:
    """The steps of both passes over ``rows`` images, with their tensors."""

    rows: int
    forward: list[Callable[[], None]]
    backward: list[Callable[[], None]]
    tensors: list[Tensor]  # by slot
    image: Tensor
    image_gradient: Tensor
    logits: Tensor
    logits_gradient: Tensor


class Program:
    """A plan with its memory: parameters folded by :meth:`fold`, one arena for all tensors.

    Attributes:
        chunk_size: how many images go through all steps at once; None: what a CPU's cache holds, all on a GPU.
        largest_chunk: the most that do; halved when memory runs out, None: no limit.
        nan_gradients: pixel values whose gradient was NaN, in the last :meth:`attack`.
    """

    def __init__(
        self, plan: Plan, nodes: list[Node], model: nn.Module, shape: tuple[int, ...], executor: TorchExecutor
    ):
        self.plan = plan
        self.shape = shape
        self.executor = executor
        self.nodes = nodes
        self.states = [State(stage) for stage in plan.stages]
        carried: dict = {}
        for state in self.states:
            stage = state.stage
            if stage.kind == "conv":
                state.convolution = executor.convolution(stage.options["geometry"])
            elif stage.kind == "segment":
                shapes = {index: nodes[index].shape for index in stage.options["takes"]}
                state.segment = Segment(stage, executor.dtype, executor.device, shapes, carried)
        self._fold = Fold(plan, self.states, model, shape, executor)
        sizes = [-(-self.slot_bytes(i) // ALIGN) * ALIGN for i in range(len(plan.slots))]
        self._offsets, self.bytes_per_image = place(sizes, plan.slots)
        self._arena: Tensor | None = None
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        self.chunk_size: int | None = None
        self.largest_chunk: int | None = None
        self.input = None
        self.nan_gradients = torch.zeros(0, dtype=torch.int64)
        self.verified: set[int] = set()  # numbers of images at once
        self._graphs = Graphs(executor.device, "attack")

    @property
    def classes(self) -> int:
        return self.plan.values[self.plan.slots[self.plan.logits].value].channels

    @property
    def blocks_bounds(self) -> bool:
        """Whether the model's clamp of its images passes no gradient at 0 or 1."""
        first = itertools.takewhile(lambda step: step[0] == "clamp", self.plan.program)
        return any(not at_bounds and (low >= 0 or high <= 1) for _, low, high, at_bounds in first)

    def fold(self, model: nn.Module) -> None:
        """Fold in the parameters as they are now."""
        self.input = self._fold(model)

    def attack(
        self,
        x: Tensor,
        clean: Tensor,
        steps: int,
        gradient_of: Callable[[Tensor, slice], Tensor],
        step: Callable[..., None],
    ) -> Tensor:
        """Take ``steps`` steps from ``x``.

        Args:
            x, clean: [N, C, H, W] float32: where to start, and the centre of the ball.
            gradient_of: (float32 logits [n, classes], rows) -> gradient of the objective, alike. In float16 that of
                the images is larger than the true one, by a factor of each image's own (:func:`magnified`).
            step: (input, x, clean, gradient, nan, out): one step on x in place, and what the next pass reads into out.
        """
        result = x.clone(memory_format=torch.contiguous_format)
        clean = clean.contiguous()
        nan = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        half = self.executor.dtype == torch.float16

        def run(bound: Bound, rows: slice) -> None:
            result[rows] = x[rows]
            nan[rows] = 0
            self.input.prepare(result[rows], bound.image)
            for _ in range(steps):
                _run(bound.forward)
                gradient = gradient_of(bound.logits.float(), rows)
                bound.logits_gradient.copy_(magnified(gradient) if half else gradient)
                _run(bound.backward)
                step(self.input, result[rows], clean[rows], bound.image_gradient, nan[rows], bound.image)

        for rows in self._chunks(len(x)):
            self.with_memory(rows, run)
        self.nan_gradients = nan
        return result

    def graphed(self, options: tuple, attack: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``attack(*inputs)``; on a GPU as a graph for these ``options``: all that it depends on besides values."""

        def shrink() -> bool:
            return self._halve(self.chunk(len(inputs[0])))

        return self._graphs(lambda: options, attack, inputs, self.memory, shrink)

    def in_turn(self) -> AbstractContextManager[None]:
        """Orders what runs inside the block after every attack before it, on whatever stream, and before the next."""
        return self._graphs.in_turn()

    def memory(self) -> list[Bound]:
        """What a graph of an attack needs besides this program."""
        return list(self._bound.values())

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits [N, classes] of images ``x``."""
        x = x.contiguous()
        logits = torch.empty(len(x), self.classes, device=x.device)

        def run(bound: Bound, rows: slice) -> None:
            self.input.prepare(x[rows], bound.image)
            _run(bound.forward)
            logits[rows] = bound.logits

        for rows in self._chunks(len(x)):
            self.with_memory(rows, run)
        return logits

    def free(self) -> None:
        """Free the arena; the next call allocates a new one."""
        self._graphs.clear()
        self._bound.clear()
        self._arena = None

    def chunk(self, images: int) -> int:
        """How many of a batch's images go through all steps at once."""
        if not self.plan.per_sample:
            return images
        fit = max(1, CACHED // self.bytes_per_image) if self.executor.device.type == "cpu" else images
        most = self.chunk_size or fit
        most = min(most, self.largest_chunk or most)
        return -(-images // -(-images // most))

    def _chunks(self, images: int):
        begin = 0
        while begin < images:  # the chunk may shrink on the way
            end = min(images, begin + self.chunk(images))
            yield slice(begin, end)
            begin = end

    def with_memory(self, rows: slice, run: Callable[[Bound, slice], None]) -> None:
        """``run`` on the rows, in smaller and smaller parts while memory runs out."""
        todo = [rows]
        while todo:
            part = todo.pop(0)
            size = part.stop - part.start
            try:
                run(self.bound(size), part)
            except (RuntimeError, MemoryError) as error:
                # A capture ends with the error: only after it can memory be freed.
                if not out_of_memory(error) or capturing(self.executor.device) or not self._halve(size):
                    raise
                middle = part.start + self.largest_chunk
                todo = [slice(part.start, middle), slice(middle, part.stop), *todo]
            finally:
                self._release()

    def _halve(self, size: int) -> bool:
        """Free the memory of chunks of ``size`` images, and have them smaller; False if they cannot be."""
        if size == 1 or not self.plan.per_sample:
            return False
        self.free()
        self.largest_chunk = (size + 1) // 2
        text = f"memory ran out with {size} images at once; continuing with {self.largest_chunk}"
        warnings.warn(text, stacklevel=5)
        return True

    def _release(self) -> None:
        for state in self.states:
            if state.segment is not None:
                state.segment.release()

    def bound(self, rows: int) -> Bound:
        """The steps for ``rows`` images."""
        if self._arena is None or self._arena.numel() < rows * self.bytes_per_image + ALIGN:
            self.free()
            self._arena = torch.empty(
                rows * self.bytes_per_image + ALIGN, dtype=torch.uint8, device=self.executor.device
            )
        bound = self._bound.get(rows)
        if bound is None:
            bound = self._bound[rows] = self._bind(rows)
            while len(self._bound) > KEPT_SIZES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(rows)
        return bound

    def _bind(self, rows: int) -> Bound:
        plan = self.plan
        tensors = [self._tensor(index, rows) for index in range(len(plan.slots))]

        def runs(steps):
            bound = []
            for step in steps:
                named = {"rows": rows}
                for role, slot in step.tensors.items():
                    if isinstance(slot, list):
                        named[role] = [None if s is None else tensors[s] for s in slot]
                    else:
                        named[role] = None if slot is None else _as_image(tensors[slot])
                bound.append(getattr(self.executor, step.operation)(self.states[step.stage], named))
            return bound

        ends = (plan.image, plan.image_gradient, plan.logits, plan.logits_gradient)
        image, image_gradient, logits, logits_gradient = (tensors[slot] for slot in ends)
        flat = (len(logits), -1)
        return Bound(
            rows, runs(plan.forward), runs(plan.backward), tensors, image, image_gradient,
            logits.view(flat), logits_gradient.view(flat),
        )  # fmt: skip

    def slot_bytes(self, index: int) -> int:
        """Per image."""
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        count = value.pixels * value.channels
        if slot.kind == "mask":
            return self.executor.mask_bytes(value)
        return count if slot.kind == "argmax" else count * self.executor.dtype.itemsize

    def _tensor(self, index: int, rows: int) -> Tensor:
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        first = -self._arena.data_ptr() % ALIGN + self._offsets[index] * rows
        memory = self._arena[first : first + self.slot_bytes(index) * rows]
        if slot.kind in ("mask", "argmax"):
            return memory
        flat = memory.view(self.executor.dtype)
        if len(value.shape) != 3:
            return flat.view(rows, *value.shape)
        channels, height, width = value.shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)


def magnified(gradient: Tensor) -> Tensor:
    """Each row of [n, classes] times the power of two that brings its largest entry to [128, 256).

    Float16 has no numbers below 6e-8, so that the gradient of an image that the network is sure of would vanish in it.
    """
    _, exponent = torch.frexp(gradient.abs().amax(1, keepdim=True))
    return torch.ldexp(gradient, (8 - exponent).clamp_(max=LARGEST_EXPONENT))


def _as_image(tensor: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, 1]."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor


def _run(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
