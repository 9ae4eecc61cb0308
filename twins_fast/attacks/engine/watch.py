"""What a plan depends on besides values: the unwrapped module, obstacles to a plan, and the model's fingerprint."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from twins_fast.nn.guards import HOOKS, has_global_hooks, has_hooks

DEEPEST, LARGEST = 4, 1 << 16  # attributes are compared by value down to this depth, arrays up to these bytes

_KNOWN = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that, on one device, do nothing but call it."""
    while not has_hooks(model):
        if type(model) is nn.DataParallel and len(model.device_ids) <= 1:
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
    if images.dtype != torch.float32:
        return f"the images are {images.dtype}"
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"{name or 'the model'} has hooks"
    if has_global_hooks():
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

    What a forward takes from globals or closures is not seen.
    """
    seen: dict[int, int] = {}  # tensors and modules, numbered: which of them are one and the same
    classes: dict[type, object] = {}
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = tuple((key, _frozen(value)) for key, value in module.__dict__.items() if key not in _KNOWN)
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
    """An attribute in a form that compares by value if it is plain data, by identity if not."""
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
