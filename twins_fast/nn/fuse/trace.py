"""Tracing a forward into a graph (torch.fx, the children as opaque calls), with proofs that nothing else happens."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from twins_fast.nn.fuse.children import containers
from twins_fast.nn.guards import random_numbers_restored
from twins_fast.nn.modes import in_mode

_FLAGS = (bool, int, float, str, bytes, torch.dtype, torch.memory_format)
_STATE = frozenset(nn.Module().__dict__)  # what every module has


class NotFused(Exception):
    """Why something is left alone."""


def trace(module: nn.Module) -> tuple[fx.Graph, Tracer]:
    """The graph of a forward that is the same in every mode, and what the forward read.

    Raises:
        NotFused: the forward does something that the graph would not do.
    """
    graphs, tracers = [], []
    for training in (True, False):
        with in_mode(module, training), _context_of(training), _unwritten(module):
            tracer = Tracer(module)
            # Which checkpointing without reentrance is made of.
            with _reporting_reads(tracer), _NoComputing(), disable_saved_tensors_hooks("hooks on saved tensors"):
                graphs.append(tracer.trace(module))
        tracers.append(tracer)
    facts = [
        ([node.target for node in graph.nodes], graph.python_code("self").src, tracer.attributes, tracer.lists)
        for graph, tracer in zip(graphs, tracers, strict=True)
    ]
    if facts[0] != facts[1]:
        raise NotFused("its forward is not the same in train and eval mode (or under autocast or no_grad)")
    return graphs[0], tracers[0]


class _Value(fx.Proxy):
    """A proxy that notices when a forward asks what it is, and tells ``x += y`` from ``x = x + y``."""

    @property
    def __class__(self):
        if sys._getframe(1).f_globals["__name__"].startswith("torch.fx."):  # which looks for proxies among arguments
            return _Value
        return self.tracer.assumed_type(self.node)


def _in_place(operation: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in fx.graph.inplace_methods:
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Traces one forward, and records what its result depends on besides its arguments.

    Attributes:
        arguments: names of the required arguments, the only ones that are traced.
        lists: those whose type the forward asked for. The trace took them for lists of tensors, which is
            what a DenseNet's layers get.
        attributes: values that the forward read, by name.
        methods: methods and properties that it read, as the class has them.
        tensors: parameters and buffers that it read and that were not None.
    """

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module):
        super().__init__()
        self.arguments: list[str] = []
        self.lists: set[str] = set()
        self.attributes: dict[str, object] = {}
        self.methods: dict[str, object] = {}
        self.tensors: set[str] = set()
        self._modules = set(module.modules())
        self._state = _context()
        self._containers = {container for _, container in containers(module)}

    def assumed_type(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise NotFused("its forward asks for the type of an intermediate result")
        self.lists.add(node.target)
        return list

    def read(self, module: nn.Module, name: str) -> None:
        """Record that the forward reads an attribute."""
        if name.startswith("__") or module not in self._modules:
            return
        if name in _STATE and (name != "training" or module is self.root):
            return
        if name in module._modules:
            return
        values = {**module._buffers, **module._parameters, **module.__dict__}
        if name not in values and module is not self.root:
            return  # its class has it
        value = values.get(name, getattr(type(module), name, None))
        if isinstance(value, Tensor) and name not in module.__dict__:  # traced where it is used
            if module is not self.root:  # the layer that it belongs to may be called elsewhere then
                raise NotFused(f"its forward reads {name!r} of {type(module).__name__}")
            self.tensors.add(name)
            return
        if name not in values and (inspect.isroutine(value) or isinstance(value, (property, type))):
            if module is self.root:
                self.methods[name] = value
            return
        if module is not self.root:
            raise NotFused(f"its forward reads {name!r} of {type(module).__name__}")
        if not _is_plain(value):
            raise NotFused(f"its forward reads {name!r}, a {type(value).__name__}, which may change unnoticed")
        self.attributes[name] = value

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        self.arguments = [
            parameter.name
            for parameter in list(inspect.signature(root_fn).parameters.values())[1:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.arguments)]

    def create_arg(self, a):
        return a.node if type(a) is _Value else super().create_arg(a)  # fx would ask for its type

    def create_node(self, *args, **kwargs):
        if _context() != self._state:
            raise NotFused("its forward changes the gradient or autocast mode")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        path = super().path_of_module(mod)
        if self.root.get_submodule(path.rpartition(".")[0]) not in self._containers:
            raise NotFused(f"its forward reaches into a child for {path}")
        return path


class _NoComputing(TorchDispatchMode):
    """Refuses whatever is computed while tracing: it would be a constant afterwards."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise NotFused(f"its forward computes {func} from no input")


def _context() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


@contextmanager
def _context_of(training: bool) -> Iterator[None]:
    """Gradients on and autocast off, or the reverse."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, not training)
        with torch.set_grad_enabled(training):
            yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _reporting_reads(tracer: Tracer) -> Iterator[None]:
    def read(module, name):
        tracer.read(module, name)
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = read
    try:
        yield
    finally:
        del nn.Module.__getattribute__


@contextmanager
def _unwritten(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that writes attributes or draws random numbers, and undo it."""

    def contents() -> list[tuple[dict, dict]]:
        return [(d, dict(d)) for m in modules for d in (m.__dict__, m._parameters, m._buffers, m._modules)]

    modules = list(module.modules())
    before = contents()
    try:
        with random_numbers_restored() as drawn:
            yield
    finally:
        written = [
            (now, old)
            for now, old in before
            if now.keys() != old.keys() or any(now[name] is not value for name, value in old.items())
        ]
        for now, old in written:
            now.clear()
            now.update(old)
    if written:
        raise NotFused("its forward writes attributes")
    if drawn:
        raise NotFused("its forward draws random numbers")


def _is_plain(value: object) -> bool:
    """Whether another value would be noticed by comparison."""
    if isinstance(value, (tuple, frozenset)):
        return all(_is_plain(item) for item in value)
    return _is_flag(value) or inspect.isroutine(value) or isinstance(value, type)


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, _FLAGS)
