"""Runs plans: captures once, folds at every attack call, and takes the steps chunk by chunk."""

from __future__ import annotations

import importlib.util
import itertools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from twins_fast.attacks.engine import plan as planning
from twins_fast.attacks.engine.capture import NotCaptured, Param, capture, tensor_of, tensors_of
from twins_fast.attacks.engine.cuda_graph import Attack, GraphedAttack
from twins_fast.attacks.engine.executors.cpu import CpuLeaves
from twins_fast.attacks.engine.executors.torch import Leaves, Segment, State
from twins_fast.ops import native

ALIGN = 64  # bytes: where every tensor of the arena starts
CACHED = 32 << 20  # bytes of arena that a chunk may take: what stays in a CPU's last cache
KEPT_PLANS = 4
KEPT_SIZES = 8  # chunk sizes with bound tensors
RESTLESS = 8  # changes in a row after which a model is left to eager
DIFFERENT = 0.05  # relative to what the model gives: a plan that does not compute the model
DEEPEST, LARGEST = 4, 1 << 16  # attributes are compared by value down to this depth, arrays up to these bytes


class Engine:
    """The plans of a model; ``lock`` is held while one is made or runs."""

    def __init__(self):
        self.lock = threading.RLock()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self.forget()

    def forget(self) -> None:
        """Drop all plans and their memory."""
        self._plans: OrderedDict[tuple, Program | str] = OrderedDict()
        self._changes: dict[tuple, int] = {}  # images' kind -> captures in a row of one that had been captured before

    def program(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program | str:
        """The program of ``model`` in eval mode for images like these in this precision, or why there is none."""
        obstacle = _obstacle(model, images)
        if obstacle:
            return obstacle
        if model is not self._model():
            self.forget()
            self._model = weakref.ref(model)
        kind = (tuple(images.shape[1:]), dtype, images.device)
        key = (*kind, fingerprint(model))
        found = self._plans.get(key)
        if found is None:
            changes = self._changes[kind] = self._changes.get(kind, -1) + 1
            if changes > RESTLESS:
                return "the model's attributes change from call to call"
            for old in [old for old in self._plans if old[:3] == kind]:  # the model is no longer what it was
                del self._plans[old]
            found = self._make(model, images, dtype)
            self._plans[key] = found
            while len(self._plans) > KEPT_PLANS:
                self._changes.pop(self._plans.popitem(last=False)[0][:3], None)
        else:
            self._changes[kind] = 0
            self._plans.move_to_end(key)
        if isinstance(found, Program) and not found.agrees(model, images):
            found = self._plans[key] = "the plan's logits or gradients are not the model's"
        return found

    def _make(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program | str:
        try:
            nodes = capture(model, tuple(images.shape[1:]), images.device)
            plan = planning.build(nodes)
            return Program(plan, nodes, model, tuple(images.shape[1:]), leaves_for(dtype, images.device))
        except NotCaptured as reason:
            return str(reason)
        except Exception as error:  # what runs in eager must not fail for the sake of a plan
            return f"planning failed: {type(error).__name__}: {error}"


def leaves_for(dtype: torch.dtype, device: torch.device) -> Leaves:
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from twins_fast.attacks.engine.executors.cuda import CudaLeaves  # imports Triton

        return CudaLeaves(dtype, device)
    has_kernels = device.type == "cpu" and native._C is not None
    return (CpuLeaves if has_kernels else Leaves)(dtype, device)


@dataclass
class Bound:
    """The steps of both passes over ``rows`` images, with their tensors."""

    rows: int
    forward: list[Callable[[], None]]
    backward: list[Callable[[], None]]
    image: Tensor
    image_gradient: Tensor
    logits: Tensor
    logits_gradient: Tensor


class Program:
    """A plan with its memory: parameters folded by :meth:`fold`, one arena for all tensors.

    Attributes:
        nan_gradients: pixel values whose gradient was NaN, in the last :meth:`attack`.
    """

    def __init__(self, plan, nodes: list, model: nn.Module, shape: tuple[int, ...], leaves: Leaves):
        self.plan = plan
        self.shape = shape
        self.leaves = leaves
        self._nodes = nodes
        self.states = [State(stage) for stage in plan.stages]
        carried: dict = {}
        for state in self.states:
            stage = state.stage
            if stage.kind == "conv":
                state.convolution = leaves.convolution(stage.options["geometry"])
            elif stage.kind == "segment":
                shapes = {index: nodes[index].shape for index in stage.options["takes"]}
                state.segment = Segment(stage, leaves.dtype, leaves.device, shapes, carried)
        self._vectors = _Vectors(self.states, model, leaves.device)
        sizes = [-(-self.slot_bytes(i) // ALIGN) * ALIGN for i in range(len(plan.slots))]
        self._offsets, self.bytes_per_image = planning.place(sizes, plan.slots)
        self._arena: Tensor | None = None
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        self._largest = 0  # chunk, after memory ran out; 0 while it never did
        self.input = None
        self.nan_gradients = 0
        self._agreed: set[int] = set()  # numbers of images
        self._graphs = GraphedAttack(leaves.device) if leaves.device.type == "cuda" else None

    @property
    def classes(self) -> int:
        return self.plan.values[self.plan.slots[self.plan.logits].value].channels

    @property
    def blocks_bounds(self) -> bool:
        """Whether the model's clamp of its images passes no gradient at 0 or 1."""
        first = itertools.takewhile(lambda step: step[0] == "clamp", self.plan.program)
        return any(not at_bounds and (low >= 0 or high <= 1) for _, low, high, at_bounds in first)

    def agrees(self, model: nn.Module, images: Tensor) -> bool:
        """Whether plan and model give the same logits and gradients on one or two of ``images``; looked at once.

        In float32 and with plain leaves, far wider than roundoff: this finds what the capture did not see.
        """
        count = min(len(images), 2)
        if count in self._agreed or count == 0:
            return True
        self._agreed.add(count)
        device = self.leaves.device
        probe = Program(self.plan, self._nodes, model, self.shape, Leaves(torch.float32, device))
        probe._largest = 1  # rows at once: they must not see each other
        x = images[:count].detach().contiguous()
        direction = torch.randn(count, self.classes, generator=torch.Generator().manual_seed(0)).to(device)
        found: list[Tensor] = []

        def gradient_of(logits: Tensor, rows: slice) -> Tensor:
            found.append(logits.clone())
            return direction[rows]

        def step(prepare, x, clean, gradient, nan, out):
            x.copy_(prepare.gradient(x, gradient))

        with torch.autocast(device.type, enabled=False):
            with torch.no_grad():
                probe.fold(model)
                gradient = probe.attack(x, x, 1, gradient_of, step)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                logits = model(leaf)
                if logits.shape != direction.shape:
                    return False
                (expected,) = torch.autograd.grad((logits * direction).sum(), leaf)
        return _close(torch.cat(found), logits.detach()) and _close(gradient, expected)

    def fold(self, model: nn.Module) -> None:
        """Take over the parameters as they are now."""
        with torch.no_grad():
            self._vectors.fill(model)
            for state in self.states:
                if state.convolution is not None:
                    weight = _float32(tensor_of(model, state.stage.options["weight"].name))
                    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
                    state.convolution.fold(weight.contiguous(), state.scale)
                elif state.segment is not None:
                    state.segment.parameters = {n: tensor_of(model, n).detach() for n in state.segment.names()}
            steps = [
                (kind, *(_float32(tensor_of(model, a.name)) if isinstance(a, Param) else a for a in arguments))
                for kind, *arguments in self.plan.program
            ]
            self.input = self.leaves.input(steps, self.shape, self.plan.resized)

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
            x, clean: [N, C, H, W] float32.
            gradient_of: (float32 logits [n, classes], rows) -> gradient of the objective, alike.
            step: (input, x, clean, gradient, nan, out): one step on x in place, and what the next pass reads into out.
        """
        result = x.clone(memory_format=torch.contiguous_format)
        clean = clean.contiguous()
        nan = torch.zeros(len(x), dtype=torch.int64, device=x.device)

        def go(bound: Bound, rows: slice) -> None:
            result[rows] = x[rows]
            nan[rows] = 0
            self.input.prepare(result[rows], bound.image)
            for _ in range(steps):
                _run(bound.forward)
                bound.logits_gradient.copy_(gradient_of(bound.logits.float(), rows))
                _run(bound.backward)
                step(self.input, result[rows], clean[rows], bound.image_gradient, nan[rows], bound.image)

        for rows in self._chunks(len(x)):
            self._with_memory(rows, go)
        self.nan_gradients = nan
        return result

    def graphed(
        self, options: tuple, model: nn.Module, attack: Attack, given: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """``attack(*given)``, which folds ``model`` and takes steps: on a GPU as a graph, one for equal ``options``."""
        if self._graphs is not None:
            addresses = tuple(t.data_ptr() for _, t in tensors_of(model))
            found = self._graphs((options, addresses), attack, given, keep=lambda: list(self._bound.values()))
            if found is not None:
                return found
            self._graphs = None
            self.free()  # it may have been taken during the capture
        return attack(*given)

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits [N, classes] of images ``x``."""
        x = x.contiguous()
        made = torch.empty(len(x), self.classes, device=x.device)

        def go(bound: Bound, rows: slice) -> None:
            self.input.prepare(x[rows], bound.image)
            _run(bound.forward)
            made[rows] = bound.logits

        for rows in self._chunks(len(x)):
            self._with_memory(rows, go)
        return made

    def free(self) -> None:
        """Give the arena back; the next call takes a new one."""
        if self._graphs is not None:
            self._graphs.clear()
        self._bound.clear()
        self._arena = None

    def chunk(self, images: int) -> int:
        """How many of a batch's images are taken through all steps at once."""
        if not self.plan.each_row:
            return images
        most = max(1, CACHED // self.bytes_per_image) if self.leaves.device.type == "cpu" else images
        most = min(most, self._largest or most)
        return -(-images // -(-images // most))

    def _chunks(self, images: int):
        begin = 0
        while begin < images:  # the chunk may shrink on the way
            end = min(images, begin + self.chunk(images))
            yield slice(begin, end)
            begin = end

    def _with_memory(self, rows: slice, go: Callable[[Bound, slice], None]) -> None:
        """``go`` on the rows, in smaller and smaller parts while memory runs out."""
        todo = [rows]
        while todo:
            part = todo.pop(0)
            size = part.stop - part.start
            try:
                go(self.bound(size), part)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or size == 1 or not self.plan.each_row:
                    raise
                self.free()
                self._largest = (size + 1) // 2
                warnings.warn(f"memory ran out with {size} images at once; going on with {self._largest}", stacklevel=4)
                middle = part.start + self._largest
                todo = [slice(part.start, middle), slice(middle, part.stop), *todo]
            finally:
                self._release()

    def _release(self) -> None:
        for state in self.states:
            if state.segment is not None:
                state.segment.release()

    def bound(self, rows: int) -> Bound:
        """The steps for so many images."""
        if self._arena is None or self._arena.numel() < rows * self.bytes_per_image + ALIGN:
            self.free()
            self._arena = torch.empty(rows * self.bytes_per_image + ALIGN, dtype=torch.uint8, device=self.leaves.device)
        found = self._bound.get(rows)
        if found is None:
            found = self._bound[rows] = self._bind(rows)
            while len(self._bound) > KEPT_SIZES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(rows)
        return found

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
                bound.append(getattr(self.leaves, step.leaf)(self.states[step.stage], named))
            return bound

        ends = (plan.image, plan.image_gradient, plan.logits, plan.logits_gradient)
        image, image_gradient, logits, logits_gradient = (tensors[slot] for slot in ends)
        flat = (len(logits), -1)
        return Bound(
            rows, runs(plan.forward), runs(plan.backward), image, image_gradient,
            logits.view(flat), logits_gradient.view(flat),
        )  # fmt: skip

    def slot_bytes(self, index: int) -> int:
        """Per image."""
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        count = value.pixels * value.channels
        if slot.kind == "mask":
            return self.leaves.mask_bytes(value)
        return count if slot.kind == "argmax" else count * self.leaves.dtype.itemsize

    def _tensor(self, index: int, rows: int) -> Tensor:
        slot = self.plan.slots[index]
        value = self.plan.values[slot.value]
        first = -self._arena.data_ptr() % ALIGN + self._offsets[index] * rows
        memory = self._arena[first : first + self.slot_bytes(index) * rows]
        if slot.kind in ("mask", "argmax"):
            return memory
        flat = memory.view(self.leaves.dtype)
        if len(value.shape) != 3:
            return flat.view(rows, *value.shape)
        channels, height, width = value.shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)


class _Vectors:
    """Scale and shift of all layers, made together."""

    def __init__(self, states: list[State], model: nn.Module, device: torch.device):
        self._layers = [s for s in states if s.stage.kind in ("conv", "affine")]
        self._norms = [s for s in self._layers if "norm" in s.stage.options]
        lengths = [self._length(s, model) for s in self._norms]
        self._eps = torch.cat(
            [
                torch.full((n,), s.stage.options["norm"]["eps"], dtype=torch.float32)
                for n, s in zip(lengths, self._norms, strict=True)
            ]
            or [torch.empty(0)]
        ).to(device)
        self._ones, self._zeros = (torch.full((max(lengths, default=0),), v, device=device) for v in (1.0, 0.0))
        self._lengths = lengths
        self._scale = torch.empty(sum(lengths), device=device)
        self._shift = torch.empty(sum(lengths), device=device)
        parts = zip(self._scale.split(lengths), self._shift.split(lengths), strict=True) if lengths else ()
        for state, (scale, shift) in zip(self._norms, parts, strict=True):
            state.scale, state.shift = scale, shift
        for state in self._layers:
            if state.scale is None and state.stage.options.get("bias") is not None:
                state.shift = torch.empty(state.stage.options["geometry"].out_channels, device=device)

    @staticmethod
    def _length(state: State, model: nn.Module) -> int:
        return tensor_of(model, state.stage.options["norm"]["mean"].name).numel()

    def fill(self, model: nn.Module) -> None:
        if self._norms:
            weight, bias, mean, var = (
                torch.cat([self._vector(model, s, entry, n) for s, n in zip(self._norms, self._lengths, strict=True)])
                for entry in ("weight", "bias", "mean", "var")
            )
            torch.mul(weight, torch.rsqrt(var + self._eps), out=self._scale)
            torch.addcmul(bias, mean, self._scale, value=-1, out=self._shift)
        for state in self._layers:
            own = state.stage.options.get("bias")
            if own is None:
                continue
            own = _float32(tensor_of(model, own.name))
            state.shift.copy_(own) if state.scale is None else state.shift.addcmul_(own, state.scale)

    def _vector(self, model: nn.Module, state: State, entry: str, length: int) -> Tensor:
        name = state.stage.options["norm"][entry]
        if name is None:
            return (self._ones if entry == "weight" else self._zeros)[:length]
        return _float32(tensor_of(model, name.name))


def _as_image(tensor: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, 1]."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor


def _close(found: Tensor, expected: Tensor) -> bool:
    """Alike in direction and length, NaN apart."""
    found, expected = (t.nan_to_num(0, 0, 0).double().flatten() for t in (found, expected))
    return bool((found - expected).norm() <= DIFFERENT * expected.norm() + 1e-6)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)


def _run(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_KNOWN = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of wrappers that do nothing on one device but call it."""
    while not _hooked(model):
        if type(model) is nn.DataParallel and len(model.device_ids) <= 1:
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            break
    return model


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def _obstacle(model: nn.Module, images: Tensor) -> str:
    """What keeps a model or its images from being planned, if anything."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "its processes exchange buffers in every forward; attack its .module"
    if images.dtype != torch.float32:
        return f"the images are {images.dtype}"
    for name, module in model.named_modules():
        if _hooked(module):
            return f"{name or 'the model'} has hooks"
    if any(getattr(nn.modules.module, hooks, None) for hooks in _GLOBAL_HOOKS):
        return "there are hooks on all modules"
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}"
        if tensor.device != images.device:
            return f"{name} is on {tensor.device}"
    return ""


class _Same:
    """Equal to itself alone; does not keep it alive if it need not."""

    def __init__(self, what: object):
        self._id = id(what)
        try:
            self._what = weakref.ref(what)
        except TypeError:
            self._what = lambda: what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._id == other._id and self._what() is other._what()

    def __hash__(self) -> int:
        return self._id


def fingerprint(model: nn.Module) -> tuple:
    """All that a captured forward depends on besides values: modules, their classes and attributes, shapes, sharing.

    What a forward takes from globals or closures is not seen.
    """
    seen: dict[int, int] = {}  # tensors and modules, numbered: which of them are one and the same
    classes: dict[type, object] = {}
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = tuple(
            (key, _frozen(value)) for key, value in module.__dict__.items() if key not in _KNOWN and key not in _HOOKS
        )
        tensors = tuple(
            (key, None if t is None else (seen.setdefault(id(t), len(seen)), tuple(t.shape), t.dtype))
            for store in (module._parameters, module._buffers)
            for key, t in store.items()
        )
        kind = type(module)
        if kind not in classes:
            own = [k for k in kind.__mro__ if not k.__module__.startswith(("torch.", "builtins"))]
            classes[kind] = tuple((k, tuple((n, _frozen(v)) for n, v in vars(k).items() if n[:2] != "__")) for k in own)
        parts.append((name, seen.setdefault(id(module), len(seen)), kind, attributes, tensors))
    return tuple(parts), tuple(classes.items())


def _frozen(value: object, depth: int = 0) -> object:
    """An attribute as something that compares by value where it is plain, by identity where not."""
    if isinstance(value, Tensor):
        return (_Same(value), value._version, tuple(value.shape), value.dtype)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, type)):
        return (type(value), value)
    if depth > DEEPEST or isinstance(value, (nn.Module, Callable)):
        return _Same(value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_frozen(item, depth + 1) for item in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_frozen(item, depth + 1) for item in value))
    if isinstance(value, dict):
        return (dict, tuple((_frozen(key, depth + 1), _frozen(item, depth + 1)) for key, item in value.items()))
    if isinstance(value, numpy.ndarray) and value.nbytes <= LARGEST:
        return (value.shape, value.dtype.str, value.tobytes())
    if hasattr(value, "__dict__"):
        return (_Same(value), _frozen(vars(value), depth + 1))
    return _Same(value)
