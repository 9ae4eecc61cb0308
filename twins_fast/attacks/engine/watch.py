"""What a plan depends on besides values: the unwrapped module, obstacles to a plan, the model's fingerprint."""

from __future__ import annotations

import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import FunctionType

import numpy
import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.function import Function
from twins_fast.attacks.engine.nodes import NotCaptured
from twins_fast.attacks.engine.reads import DEEPEST, LONGEST, Reads, function_in
from twins_fast.nn.guards import HOOKS, computed_by_hooks, has_global_hooks, has_hooks, has_other_hooks
from twins_fast.nn.modes import modules_of

PLANNED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of images
LARGEST = 1 << 16  # bytes up to which arrays are compared by value

_STORES = ("_parameters", "_buffers", "_modules")
# Attributes that every module has, and one that torch.compile gives to what it wraps.
_KNOWN = frozenset({*vars(nn.Module()), "_is_torch_compile"})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, type)


class Wrapper(nn.Module):
    """Calls its ``module``, and an attack may as well do that."""

    module: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that, on one device, do nothing but call it."""
    while not has_hooks(model):
        if isinstance(model, Wrapper) or (type(model) is nn.DataParallel and len(model.device_ids) <= 1):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod
        else:
            break
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made it, asked without importing the compiler, which takes a second."""
    return isinstance(module, getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ()))


def obstacle(model: nn.Module, images: Tensor) -> str:
    """Why this model cannot be planned for these images; empty if it can."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "its processes exchange buffers in every forward; attack its .module"
    if images.dtype not in PLANNED_DTYPES:
        return f"the images are {images.dtype}: a plan computes in float32 and half precision"
    for name, module in model.named_modules():
        if has_other_hooks(module):
            return f"{name or 'the model'} has hooks, which a plan would not call: remove them (handle.remove())"
    if has_global_hooks():
        return "there are hooks on all modules, which a plan would not call: remove them (handle.remove())"
    types = set()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}: a plan needs plain tensors"
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, images.dtype):
            return f"{name} is {tensor.dtype} and the images are {images.dtype}: convert one of them"
        types.add(tensor.dtype)
        if tensor.device != images.device:
            return f"{name} is on {tensor.device} and the images are on {images.device}: move one of them"
    if torch.float32 in types and images.dtype not in types:
        return f"the model is torch.float32 and the images are {images.dtype}: convert one of them"
    return ""


class Watch:
    """Notices what changes about a model from one look to the next.

    Attributes:
        fingerprint: the very same object as long as it is equal; None while the model cannot be examined.
        changes: how often the fingerprint has changed, or tensors have moved.
    """

    def __init__(self) -> None:
        self.fingerprint: tuple | None = None
        self.changes = 0
        self._snapshot: Snapshot | None = None

    def state(self) -> Hashable:
        """Another one after every look at changed parameters; but what writes to ``.data`` is not seen in it.

        None if the parameters do not say when they change.
        """
        versions = self._snapshot.versions()
        return None if versions is None else (self.changes, versions)

    def look(self, model: nn.Module) -> bool:
        """Whether anything but values may have changed since the last look.

        Raises:
            NotCaptured: see :func:`fingerprint`.
        """
        last, before = self._snapshot, self.fingerprint
        if last is not None and last.holds(model):
            return False
        self._snapshot = self.fingerprint = None
        seen = fingerprint(model)
        self.fingerprint = before if seen == before else seen
        self._snapshot = Snapshot(model)
        self.changes += self.fingerprint is not before or last is None or self._snapshot.tensors != last.tensors
        return True


class Snapshot:
    """A model at one moment, to be compared in every attack, in a tenth of the time that a fingerprint takes.

    It keeps what it has seen alive, so that nothing new can take its place unnoticed.

    Attributes:
        tensors: address, shape, strides and dtype of each.
    """

    def __init__(self, model: nn.Module):
        modules = modules_of(model)
        self._model = weakref.ref(model)  # whoever owns this snapshot must not keep the model
        self._below = modules[1:]
        self._types = [type(module) for module in modules]
        self._classes = list(dict.fromkeys(own for kind in self._types for own in _own_classes(kind)))
        self._contents = [(list(d), list(d.values())) for d in self._dictionaries(modules)]
        harmless = [module._forward_pre_hooks for module in modules if _computes_weights(module)]
        hooks = [vars(module)[name] for module in modules for name in HOOKS if name in vars(module)]
        self._hooks = [own for own in hooks if not any(own is known for known in harmless)]
        self._harmless = [(own, list(own.values())) for own in harmless]
        self._held = [value for _, values in self._contents for value in values if isinstance(value, Tensor)]
        self.tensors = self._facts()
        entries = (*map(_attributes_of, modules), *map(vars, self._classes))
        own = [pair for d in entries for pair in d.items() if _is_own(pair[0])]
        self._reads = _reads_of(modules, self._classes)
        values = [value for _, value in own] + [read.value for read in self._reads if _is_data(read.value)]
        self._mutable = [(value, _frozen(value)) for value in values if not _is_fixed(value)]

    def holds(self, model: nn.Module) -> bool:
        """Whether all that a fingerprint, an obstacle or the tensors' addresses depend on is surely as it was."""
        if (
            model is not self._model()
            or any(self._hooks)
            or any(list(own.values()) != hooks for own, hooks in self._harmless)
            or has_global_hooks()
            or [type(module) for module in (model, *self._below)] != self._types
        ):
            return False
        for now, (names, values) in zip(self._dictionaries((model, *self._below)), self._contents, strict=True):
            if list(now) != names or not all(map(operator.is_, now.values(), values)):
                return False
        if self._facts() != self.tensors or not all(read.holds() for read in self._reads):
            return False
        return all(_frozen(value) == frozen for value, frozen in self._mutable)

    def versions(self) -> tuple[int, ...] | None:
        """How often each tensor has been written to; None if one of them does not count."""
        if any(t.is_inference() for t in self._held):
            return None
        return tuple([t._version for t in self._held])

    def _dictionaries(self, modules: Iterable[nn.Module]) -> Iterator[Mapping[str, object]]:
        for module in modules:
            yield _attributes_of(module)
            yield from (vars(module)[name] for name in _STORES)
        yield from map(vars, self._classes)

    def _facts(self) -> list[tuple]:
        return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self._held]


def _computes_weights(module: nn.Module) -> bool:
    return bool(computed_by_hooks(module)) and not has_other_hooks(module)


def _attributes_of(module: nn.Module) -> Mapping[str, object]:
    """Without what hooks compute anew in every forward."""
    computed = computed_by_hooks(module)
    own = vars(module)
    return {name: value for name, value in own.items() if name not in computed} if computed else own


def _is_own(name: str) -> bool:
    """Whether an attribute of a module or class is there for its forward."""
    return name not in _KNOWN and name[:2] != "__"


def _is_fixed(value: object) -> bool:
    """Whether :func:`_frozen` says the same of the very same object whenever it is asked."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_fixed, value))
    return isinstance(_frozen(value), _Same) or isinstance(value, _PLAIN)


class _Same:
    """Equal to itself alone; a weak reference where the object allows one."""

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

    Of what functions read besides, plain data, tensors and arrays are looked into.

    Raises:
        NotCaptured: TorchScript, whose attributes are not Python's.
    """
    seen: dict[int, int] = {}  # tensors and modules, numbered: which of them are one and the same
    classes: dict[type, object] = {}
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            where = name or "the model"
            raise NotCaptured(f"{where} is TorchScript, whose code cannot be looked at: attack what it was made from")
        attributes = tuple((key, _frozen(value)) for key, value in _attributes_of(module).items() if _is_own(key))
        tensors = tuple(
            (key, None if t is None else (seen.setdefault(id(t), len(seen)), tuple(t.shape), t.dtype))
            for store in (module._parameters, module._buffers)
            for key, t in store.items()
        )
        kind = type(module)
        if kind not in classes:
            classes[kind] = tuple(
                (k, tuple((n, _frozen(v)) for n, v in vars(k).items() if _is_own(n))) for k in _own_classes(kind)
            )
        parts.append((name, seen.setdefault(id(module), len(seen)), kind, attributes, tensors))
    own = list(dict.fromkeys(k for kind in classes for k in _own_classes(kind)))
    reads = _reads_of(modules_of(model), own)
    read = tuple((r.name, _frozen(r.value) if _is_data(r.value) else _Same(r.value)) for r in reads)
    return tuple(parts), tuple(classes.items()), read


def _reads_of(modules: Iterable[nn.Module], classes: Iterable[type]) -> Reads:
    """What forwards read, and what in attributes can be called; of a class the methods that any of this code names."""
    reads = Reads()
    for module in modules:
        if isinstance(module, Function):
            reads.follow(module.function)
        for name, value in vars(module).items():
            if _is_own(name) and callable(value) and not isinstance(value, (type, nn.Module)):
                reads.follow(value)
    followed: set[FunctionType | None] = {None}
    methods = [(name, function_in(entry)) for kind in classes for name, entry in vars(kind).items()]
    while reached := {f for name, f in methods if name in reads.names | {"forward"}} - followed:
        followed |= reached
        for function in [f for _, f in methods if f in reached]:
            reads.follow(function)
    return reads


def _is_data(value: object) -> bool:
    """Whether a value that functions read is looked into."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return len(value) <= LONGEST
    return isinstance(value, (Tensor, numpy.ndarray, *_PLAIN))


def _own_classes(kind: type) -> list[type]:
    """The classes of a module that are not PyTorch's."""
    return [k for k in kind.__mro__ if not k.__module__.startswith(("torch.", "builtins"))]


def _frozen(value: object, depth: int = 0) -> object:
    """An attribute in a form that compares by value if it is plain data, by identity if not."""
    if isinstance(value, Tensor):
        return (_Same(value), value._version, tuple(value.shape), value.dtype)
    if isinstance(value, _PLAIN):
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
