"""A plan with its memory: one arena, a batch in chunks, steps bound to their tensors."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.cuda_graph import Function, Graphs
from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.segment import Segment
from twins_fast.attacks.engine.executors.torch import State, TorchExecutor
from twins_fast.attacks.engine.fold import Fold
from twins_fast.attacks.engine.memory import out_of_memory, place
from twins_fast.attacks.engine.nodes import Node
from twins_fast.attacks.engine.passes import Bound, Kept, Pass
from twins_fast.attacks.engine.plan import LIKE_VALUES, SEGMENTS, Plan, Stage
from twins_fast.devices import capturing
from twins_fast.models.output import Output

ALIGN = 64  # bytes: where every tensor of the arena starts
CACHED = 32 << 20  # bytes of arena that a chunk may take: what stays in a CPU's last-level cache
FEWEST, UNCACHED = 4, 256 << 20  # images that a chunk takes even so, for the weights' sake, and bytes for them
SPARE = 3  # images whose time a chunk of its own takes longer
KEPT_SIZES = 16  # chunk sizes with bound tensors


class Program:
    """A plan with its memory: parameters folded by :meth:`fold`, one arena for all tensors.

    Attributes:
        output: which of the model's results the logits are.
        chunk_size: how many images go through all steps at once; None: what a CPU's cache holds, all on a GPU.
        largest_chunk: the most that do; halved when memory runs out, None: no limit.
        folded: the state of the parameters that were folded last, see :meth:`Watch.state`; None if it is not known.
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
                state.segment = Segment(stage, executor.dtype, executor.device, carried)
        self._fold = Fold(plan, self.states, model, shape, executor)
        self._segments = [state.segment for state in self.states if state.segment is not None]
        sizes = [-(-self.slot_bytes(i) // ALIGN) * ALIGN for i in range(len(plan.slots))]
        first = [slot.first < plan.loss < slot.last and i != plan.image for i, slot in enumerate(plan.slots)]
        self._offsets, self.bytes_per_image = place(sizes, plan.slots, first)
        self._saved_bytes = sum(size for size, saved in zip(sizes, first, strict=True) if saved)
        self._arena: Tensor | None = None
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        self.output: Output = None
        self.chunk_size: int | None = None
        self.largest_chunk: int | None = None
        self.input: Input | None = None
        self.folded: Hashable = None
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

    def pays(self, images: int, steps: int) -> bool:
        """Whether so many steps on so many images save more time than it takes to fold the weights."""
        if self.executor.device.type != "cpu":
            return True
        layers = [stage.options["geometry"] for stage in self.plan.stages if stage.kind == "conv"]
        operations = 2 * images * steps * sum(layer.operations for layer in layers)
        return operations >= self.executor.folding * sum(layer.weights for layer in layers)

    def in_parts(self, images: int, work: Callable[[Pass, slice], None], rounded: bool = False) -> None:
        """``work(network, rows)`` on all rows, a chunk at a time; where memory runs out anew, on smaller ones."""
        begin = 0
        while begin < images:
            size = self.chunk(images - begin if rounded else images, rounded)
            rows = slice(begin, min(images, begin + size))
            taken = rows.stop - begin
            try:
                bound = self.bound(round_up(taken) if rounded and self.plan.per_sample else taken)
                work(Pass(bound, self.input, self._segments), rows)
                begin = rows.stop
            except (RuntimeError, MemoryError) as error:
                # A capture ends with the error: only after it can memory be freed.
                if not out_of_memory(error) or capturing(self.executor.device) or not self._halve(taken):
                    raise
            finally:
                self._release()

    def _release(self) -> None:
        for segment in self._segments:
            segment.release()

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
        return self._forward(x, None)

    def forward(self, x: Tensor, about: Hashable, differentiable: bool) -> tuple[Tensor, list[Kept]]:
        """The logits, and what :meth:`backward` needs; on a GPU as a graph for ``about`` (see :meth:`graphed`)."""
        kept: list[Kept] = []

        def run(x: Tensor) -> tuple[Tensor, ...]:
            kept.clear()
            logits = self._forward(x, kept if differentiable else None, rounded=True)
            return logits, *(part.saved for part in kept)

        logits, *saved = self._as_one(("forward", differentiable, about), run, (x,))
        return logits, kept if self._segments else [Kept(part) for part in saved]

    def backward(self, x: Tensor, gradient: Tensor, kept: list[Kept], about: Hashable) -> Tensor:
        """The gradient of the images ``x``, from that of their logits; any number of times after a :meth:`forward`."""

        def run(x: Tensor, gradient: Tensor, *saved: Tensor) -> tuple[Tensor]:
            result, begin = torch.empty_like(x), 0
            try:
                for part, data in zip(kept, saved, strict=True):
                    rows = slice(begin, begin := min(len(x), begin + len(data)))
                    network = Pass(part.bound or self.bound(len(data)), self.input, self._segments)
                    network.restore(data, part.segments)
                    if self.plan.keeps_image:
                        network.prepare(x[rows])
                    result[rows] = network.gradient(x[rows], gradient[rows])
            finally:
                self._release()
            return (result,)

        inputs = (x.contiguous(), gradient.float(), *(part.saved for part in kept))
        return self._as_one(("backward", about), run, inputs)[0]

    def _forward(self, x: Tensor, kept: list[Kept] | None, rounded: bool = False) -> Tensor:
        x = x.contiguous()
        logits = torch.empty(len(x), self.classes, device=x.device)

        def work(network: Pass, rows: slice) -> None:
            logits[rows] = network.logits(x[rows])
            if kept is not None:
                kept.append(network.keep())

        self.in_parts(len(x), work, rounded)
        return logits

    def _as_one(self, options: tuple, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As a graph, unless PyTorch's own graphs of segments, which are no tensors, have to outlive it."""
        if self._segments:
            with self.in_turn():
                return function(*inputs)
        return self.graphed(options, function, inputs)

    def free(self) -> None:
        """Free the arena; the next call allocates a new one."""
        self._graphs.clear()
        self._bound.clear()
        self._arena = None

    def chunk(self, images: int, rounded: bool = False) -> int:
        """How many of a batch's images go through all steps at once.

        Args:
            rounded: for batches of many sizes: the steps take one of few numbers of images, the last ones perhaps more
                than there are; ``images`` are those that are left, and fewer may go on alone.
        """
        most = self.chunk_size
        if most is None and self.executor.device.type == "cpu":
            most = max(1, CACHED // self.bytes_per_image, min(FEWEST, UNCACHED // self.bytes_per_image))
        limited = most is not None
        most = min(most or images, self.largest_chunk or images, images)
        if not self.plan.per_sample:
            return images
        if not rounded:
            return -(-images // -(-images // most))
        fits = most == images and (not limited or round_up(images) - images <= max(SPARE, images // 16))
        return images if fits else round_down(most)

    def sizes(self, images: int, rounded: bool) -> set[int]:
        """The numbers of images at once that a batch is checked for."""
        if not rounded or not self.plan.per_sample:
            return {self.chunk(images)}
        found = set()
        while images:
            size = self.chunk(images, rounded)
            found.add(round_up(size))
            images -= size
        return found

    def _halve(self, size: int) -> bool:
        """Free the memory of chunks of ``size`` images, and have them smaller; False if they cannot be."""
        if size == 1 or not self.plan.per_sample:
            return False
        self.free()
        self.largest_chunk = (size + 1) // 2
        text = f"memory ran out with {size} images at once; continuing with {self.largest_chunk}"
        warnings.warn(text, stacklevel=5)
        return True

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

        def image_of(slot: int, size: tuple[int, int] | None = None) -> Tensor:
            return _as_image(tensors[slot], size) if plan.slots[slot].kind in LIKE_VALUES else tensors[slot]

        def runs(steps):
            bound = []
            for step in steps:
                named = {"rows": rows, "part": step.part}
                sizes = _sizes(plan.stages[step.stage], step.operation)
                for role, slot in step.tensors.items():
                    if isinstance(slot, list):
                        plain = step.operation in SEGMENTS
                        named[role] = [None if s is None else tensors[s] if plain else image_of(s) for s in slot]
                    else:
                        named[role] = None if slot is None else image_of(slot, sizes.get(role))
                bound.append(getattr(self.executor, step.operation)(self.states[step.stage], named))
            return bound

        ends = (plan.image, plan.image_gradient, plan.logits, plan.logits_gradient)
        image, image_gradient, logits, logits_gradient = (tensors[slot] for slot in ends)
        flat = (len(logits), -1)
        return Bound(
            rows, runs(plan.forward), runs(plan.backward), tensors, image, image_gradient,
            logits.view(flat), logits_gradient.view(flat), self._memory(0, self._saved_bytes, rows).view(rows, -1),
        )  # fmt: skip

    def slot_bytes(self, index: int) -> int:
        """Per image."""
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        count = value.pixels * value.channels
        if slot.kind == "mask":
            return self.executor.mask_bytes(value)
        if slot.kind == "moments":
            return value.pixels * 2 * torch.float32.itemsize
        return count * (self.executor.argmax_bytes if slot.kind == "argmax" else self.executor.dtype.itemsize)

    def _memory(self, offset: int, size: int, rows: int) -> Tensor:
        """Of the arena, for ``rows`` images; offset and size are per image."""
        first = -self._arena.data_ptr() % ALIGN + offset * rows
        return self._arena[first : first + size * rows]

    def _tensor(self, index: int, rows: int) -> Tensor:
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        memory = self._memory(self._offsets[index], self.slot_bytes(index), rows)
        if slot.kind in ("mask", "argmax"):
            return memory
        if slot.kind == "moments":
            return memory.view(torch.float32).view(rows, value.pixels, 2)
        flat = memory.view(self.executor.dtype)
        if len(value.shape) != 3:
            return flat.view(rows, *value.shape)
        channels, height, width = value.shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)


def _sizes(stage: Stage, operation: str) -> dict[str, tuple[int, int]]:
    """Height and width of an operation's tensors, where they matter: others may have arranged the pixels otherwise."""
    if stage.kind not in ("conv", "max_pool", "avg_pool") or operation == "finish":
        return {}
    sizes = stage.options["geometry"] if stage.kind == "conv" else stage.options["sizes"]
    of, to = sizes.in_size, sizes.out_size
    return {"g": to, "dx": of, "other": of} if operation.endswith("_backward") else {"x": of, "y": to, "other": to}


def _as_image(tensor: Tensor, size: tuple[int, int] | None) -> Tensor:
    """An image [N, C, H, W] of that size; where it does not matter, [N, C, pixels, 1]."""
    if tensor.dim() == 1:
        return tensor
    rows = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
    return rows.view(len(rows), *(size or (-1, 1)), rows.shape[-1]).permute(0, 3, 1, 2)


def round_up(images: int) -> int:
    """To one of four numbers in every octave."""
    step = _step(images)
    return -(-images // step) * step


def round_down(images: int) -> int:
    return images - images % _step(images)


def _step(images: int) -> int:
    return 1 << max(0, images.bit_length() - 3)
