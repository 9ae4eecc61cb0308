"""Two-wing batch norm, the residual sum and the ReLU after it as one call, in any network that allows it.

A network says what follows a batch norm only in its forward. So the forward of every module that holds
two-wing layers is traced (torch.fx, the children as opaque calls), and where the trace proves that nothing
else sees the intermediate results, the module gets a subclass of its own class whose forward passes residual
and ReLU to the layer. The layers themselves do not change: called by anyone else they do what they did.

What the trace took for granted about the module is checked at every call (:meth:`_Plan.holds`); when it has
changed, the original forward runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from twins_fast.nn.guards import has_hooks, is_untouched, random_numbers_restored
from twins_fast.nn.layers import TwinBatchNorm2d, TwinBatchNormAct2d
from twins_fast.nn.modes import in_mode
from twins_fast.nn.wings import require_twin_layers

_SUM = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}  # -> whether in place
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_PURE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, TwinBatchNorm2d)  # neither write their input nor return its memory
_FLAGS = (bool, int, float, str, bytes, torch.dtype, torch.memory_format)
_STATE = frozenset(nn.Module().__dict__)  # what every module has

_tracing = threading.RLock()  # fx and the tracer below replace methods of nn.Module while they trace

Path = tuple[str, ...]


class Fusion(NamedTuple):
    """What became of one two-wing layer."""

    layer: str  # name in the network
    fused: str  # what runs in the same call: "relu", "add", "add+relu"; "" for nothing
    why: str  # the reason, where nothing or not everything is fused

    def __str__(self) -> str:
        return f"{self.layer}: {self.fused or 'left alone'}{self.why and f' ({self.why})'}"


def fuse_twin_bn(model: nn.Module) -> nn.Module:
    """Run batch norm, residual sum and ReLU of ``model`` as one call wherever that provably changes nothing.

    In place; :func:`fusion_report` says for every layer what became of it, :func:`twins_fast.revert_twin_bn`
    undoes it, a second call changes nothing. Parameters, buffers, state dict, hooks, children and
    ``isinstance`` stay, and so do ``deepcopy`` and pickle (which traces anew on loading). With the torch
    backend results are the same to the bit.

    A forward is left alone when it cannot be traced or is not the same in train and eval mode, with and
    without gradients or autocast. A fused forward steps back for the original one while a fused layer has
    hooks, when an attribute that it reads has changed (``grad_checkpointing``, say) or a child has been
    replaced, or when it is called with keyword or optional arguments. What it cannot notice: module globals
    that change later, side effects on them (printing), hooks on all modules of the process, and comparisons
    of values with ``is`` or ``type()``. The class of a fused module is a subclass of what it was.
    While this runs, and :func:`fusion_report`, no other thread may use the model.

    As in train mode, results of the kernels can then be differentiated once in eval mode too.

    Args:
        model: a network with two-wing layers (:func:`twins_fast.convert_twin_bn`).

    Raises:
        ValueError: a model without two-wing layers.
    """
    require_twin_layers(model)
    for _, module in _owners(model):
        _fuse(module)
    return model


def fusion_report(model: nn.Module) -> list[Fusion]:
    """One row per two-wing layer of ``model``, in the network's order. Nothing is changed.

    Raises:
        ValueError: a model without two-wing layers.
    """
    require_twin_layers(model)
    rows = []
    if isinstance(model, TwinBatchNorm2d):
        rows.append(Fusion("", *_alone(model, "it is the model itself")))
    for prefix, owner in _owners(model):
        plan, fresh = getattr(type(owner), "plan", None), False
        if plan is None or not plan.holds(owner):
            with _unfused(owner):
                plan, fresh = _Plan(owner), True
        for path, (fused, why) in plan.rows.items():
            if fresh and path in plan.rewritten:
                fused, why = "", f"{fused} can be fused: call fuse_twin_bn"
            rows.append(Fusion(".".join(filter(None, (prefix, *path))), fused, why))
    return rows


def unfused_type(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before :func:`twins_fast.fuse_twin_bn`."""
    return type(module).__dict__.get("unfused_type", type(module))


class _Left(Exception):
    """Why something is left alone."""


def _subclass(original: type[nn.Module], extra: dict) -> type[nn.Module]:
    """A subclass that looks like ``original``; with one base, which is what allows modules to change to it."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original)(original.__name__, (original,), {**names, "unfused_type": original, **extra})


@contextmanager
def _unfused(module: nn.Module) -> Iterator[None]:
    fused = type(module)
    module.__class__ = unfused_type(module)
    try:
        yield
    finally:
        module.__class__ = fused


def _deepcopy(module: nn.Module, memo: dict) -> nn.Module:
    with _unfused(module):
        twin = copy.deepcopy(module, memo)
    twin.__class__ = type(module)
    return twin


def _reduce(module: nn.Module, protocol: int) -> tuple:
    with _unfused(module):
        make, arguments, *state = module.__reduce_ex__(protocol)
    return _load, (make, arguments), *state


def _load(make: Callable[..., nn.Module], arguments: tuple) -> nn.Module:
    """A module between its making and its state in a pickle."""
    module = make(*arguments)
    module.__class__ = _subclass(type(module), {"__setstate__": _set_state})
    return module


def _set_state(module: nn.Module, state: dict) -> None:
    module.__class__ = unfused_type(module)
    module.__setstate__(state)
    _fuse(module)


def _fuse(module: nn.Module) -> None:
    plan = getattr(type(module), "plan", None)
    if plan is not None and (plan.holds(module) or "plan" not in type(module).__dict__):
        return  # the latter: someone else's subclass of a fused class
    module.__class__ = original = unfused_type(module)
    plan = _Plan(module)
    if not plan.runs:
        return

    def forward(self, *args, **kwargs):
        run = None if kwargs else plan.choose(self, args)
        return original.forward(self, *args, **kwargs) if run is None else run(self, *args)

    # With a code object of its own torch.compile counts its compilations apart from those of other modules.
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    methods = {"forward": functools.wraps(original.forward)(own), "__deepcopy__": _deepcopy, "__reduce_ex__": _reduce}
    with suppress(TypeError):  # a class that forbids such a subclass stays as it is
        module.__class__ = _subclass(original, {"plan": plan, **methods})


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward calls two-wing layers, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, (TwinBatchNorm2d, torch.jit.ScriptModule)) or _is_container(module):
            continue
        if _layers(module):
            yield name, module


def _is_container(module: nn.Module) -> bool:
    """Whether a module, ModuleList for one, has no forward and is what the module above makes of it."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is nn.Module.forward


def _containers(module: nn.Module, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """``module`` and the containers through which it reaches children, with their paths."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and _is_container(child):
            yield from _containers(child, (*path, name))


def _layers(module: nn.Module) -> dict[Path, TwinBatchNorm2d]:
    """The two-wing layers that ``module`` calls itself, a shared one under its first path."""
    found: dict[TwinBatchNorm2d, Path] = {}
    for path, holder in _containers(module):
        for name, child in holder._modules.items():
            if isinstance(child, TwinBatchNorm2d):
                found.setdefault(child, (*path, name))
    return {path: layer for layer, path in found.items()}


def _at(module: nn.Module | None, path: Path) -> nn.Module | None:
    for name in path:
        module = module and module._modules.get(name)
    return module


def _alone(layer: TwinBatchNorm2d, why: str) -> tuple[str, str]:
    """What a layer does in one call by itself, and why not more."""
    if type(layer) is TwinBatchNormAct2d and type(layer.act) is not nn.Identity:
        if not layer.fuses_act():
            return "", f"its drop and {type(layer.act).__name__} are computed after it"
        return "relu", ""
    return "", why


class _Plan:
    """How a module's forward is fused, and what that takes for granted.

    Attributes:
        rows: for every layer (fused, why), as in :class:`Fusion`.
        rewritten: the layers that the new forwards call with residual or ReLU.
        runs: the new forwards, each with the type that its arguments must have, if the forward asks for
            it; empty if there is nothing to rewrite.
    """

    def __init__(self, module: nn.Module):
        self.rows: dict[Path, tuple[str, str]] = {}
        self.rewritten: set[Path] = set()
        self.runs: list[tuple[type | None, Callable]] = []
        self._arguments = 0
        self._attributes: dict[str, object] = {}
        self._methods: dict[str, object] = {}  # and properties, as the class has them
        self._tensors: set[str] = set()
        self._forward = type(module).forward
        self._children = _children(module)
        self._types: dict[Path, type] = {}  # of what the forward calls
        self._parts: dict[Path, type] = {}  # modules that must stay of this very type, and without hooks
        candidates = {}
        for path, layer in _layers(module).items():
            why = _obstacle(layer)
            if why:
                self.rows[path] = _alone(layer, why)
            else:
                self.rows[path] = "", ""
                candidates[".".join(path)] = path
        if candidates:
            try:
                with _tracing:
                    self._trace(module, candidates)
            except Exception as error:  # an unknown forward may fail in any way when it gets no tensors
                why = str(error) if isinstance(error, _Left) else f"its forward cannot be traced: {error}"
                why = f"{type(module).__name__}: {' '.join(why.split())}"
                self.rows.update({path: ("", why) for path in candidates.values()})
                self.rewritten, self.runs = set(), []

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` still is what was traced."""
        for name, expected in self._attributes.items():
            if not _same(getattr(module, name, None), expected):
                return False
        if any(getattr(module, name, None) is None for name in self._tensors):
            return False
        if unfused_type(module).forward is not self._forward or _children(module) != self._children:
            return False
        for name, expected in self._methods.items():
            if name in module.__dict__ or not _same(getattr(type(module), name, None), expected):
                return False
        if any(unfused_type(_at(module, path)) is not kind for path, kind in self._types.items()):
            return False
        return all(is_untouched(_at(module, path), kind) for path, kind in self._parts.items())

    def choose(self, module: nn.Module, arguments: tuple) -> Callable | None:
        """The fused forward for these arguments, or ``None``: the original one."""
        if len(arguments) != self._arguments or any(a is None for a in arguments) or not self.holds(module):
            return None
        for kind, run in self.runs:
            if kind is None or all(isinstance(a, kind) for a in arguments):
                return run
        return None

    def _trace(self, module: nn.Module, candidates: dict[str, Path]) -> None:
        if "forward" in module.__dict__:
            raise _Left("its forward was replaced on the object")
        traces = {None: _traced(module, Tensor)}
        if traces[None][1].asked:
            traces = {Tensor: traces[None]}
            with suppress(Exception):  # then lists take the original forward
                traces[list] = _traced(module, list)
        outcomes = []
        for kind, (graph, tracer) in traces.items():
            self._arguments = tracer.arguments
            self._attributes.update(tracer.attributes)
            self._tensors.update(tracer.tensors)
            self._methods.update(tracer.methods)
            for node in graph.nodes:
                if node.op == "call_module":
                    path = tuple(node.target.split("."))
                    self._types[path] = unfused_type(_at(module, path))
                    if _is_pure(node, module):
                        self._parts[path] = type(_at(module, path))
            outcome, parts = _rewrite(graph, module, candidates)
            outcomes.append(outcome)
            self._parts.update(parts)
            self.runs.append((kind, _compiled(graph, module)))
        if any(outcome != outcomes[0] for outcome in outcomes):
            raise _Left("what can be fused depends on the type of its input")
        for name, path in candidates.items():
            self.rows[path] = outcomes[0].get(name, ("", "its forward does not call it"))
            if self.rows[path][0]:
                self.rewritten.add(path)
        if not self.rewritten:
            self.runs = []


def _children(module: nn.Module) -> list[tuple[Path, list]]:
    """The names of all children, and which of them are the same module."""
    first: dict[int, int] = {}
    return [
        (
            path,
            [
                (name, None if child is None else first.setdefault(id(child), len(first)))
                for name, child in holder._modules.items()
            ],
        )
        for path, holder in _containers(module)
    ]


def _same(value: object, expected: object) -> bool:
    return value is expected or (type(value) is type(expected) and value == expected)


def _obstacle(layer: TwinBatchNorm2d) -> str:
    """Why no forward may pass residual or ReLU to ``layer``."""
    if type(layer) not in (TwinBatchNorm2d, TwinBatchNormAct2d) or "forward" in layer.__dict__:
        return f"the forward of {type(layer).__name__} is not known"
    if has_hooks(layer):
        return "it has hooks, which would see another result"
    if isinstance(layer, TwinBatchNormAct2d) and not is_untouched(layer.act, nn.Identity):
        return f"{type(layer.act).__name__} is part of it"
    return ""


# Tracing.


class _Value(fx.Proxy):
    """A proxy that notices when a forward asks what it is, and tells ``x += y`` from ``x = x + y``."""

    @property
    def __class__(self):
        frame = sys._getframe(1)
        asker = frame.f_globals.get("__name__", "")
        asks_for_others = frame.f_code.co_name == "is_tensor" or asker.startswith(("torch.jit", "torch._jit"))
        if asker.partition(".")[0] == "torch" and not asks_for_others:
            return _Value
        return self.tracer.claimed_type(self.node)


def _in_place(operation: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in fx.graph.inplace_methods:
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, claim: type):
        super().__init__()
        self.claim, self.asked = claim, False
        self.arguments = 0
        self.attributes: dict[str, object] = {}
        self.methods: dict[str, object] = {}
        self.tensors: set[str] = set()  # parameters and buffers that were not None
        self._watched = set(module.modules())
        self._state = _context()
        self._holders = {holder for _, holder in _containers(module)}

    def claimed_type(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise _Left("its forward asks for the type of an intermediate result")
        self.asked = True
        return self.claim

    def read(self, module: nn.Module, name: str) -> None:
        """Note what the forward has learnt from an attribute."""
        if name.startswith("__") or module not in self._watched:
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
                raise _Left(f"its forward reads {name!r} of {type(module).__name__}")
            self.tensors.add(name)
            return
        if name not in values and (inspect.isroutine(value) or isinstance(value, (property, type))):
            if module is self.root:
                self.methods[name] = value
            return
        if module is not self.root:
            raise _Left(f"its forward reads {name!r} of {type(module).__name__}")
        if not _is_plain(value):
            raise _Left(f"its forward reads {name!r}, a {type(value).__name__}, which may change unnoticed")
        self.attributes[name] = value

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        required = [
            parameter.name
            for parameter in list(inspect.signature(root_fn).parameters.values())[1:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        self.arguments = len(required)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required)]

    def create_node(self, *args, **kwargs):
        if _context() != self._state:
            raise _Left("its forward changes the gradient or autocast mode")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        path = super().path_of_module(mod)
        if self.root.get_submodule(path.rpartition(".")[0]) not in self._holders:
            raise _Left(f"its forward reaches into a child for {path}")
        return path


class _NoComputing(TorchDispatchMode):
    """Refuses whatever is computed while tracing: it would be a constant afterwards."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise _Left(f"its forward computes {func} from no input")


def _traced(module: nn.Module, claim: type) -> tuple[fx.Graph, _Tracer]:
    """The graph of a forward that is the same in every mode, for arguments of the claimed type."""
    graphs, tracers = [], []
    for training in (True, False):
        with in_mode(module, training), _context_of(training), _unwritten(module):
            tracer = _Tracer(module, claim)
            with _reporting_reads(tracer), _NoComputing():
                graphs.append(tracer.trace(module))
        tracers.append(tracer)
    facts = [
        ([node.target for node in graph.nodes], graph.python_code("self").src, tracer.attributes, tracer.asked)
        for graph, tracer in zip(graphs, tracers, strict=True)
    ]
    if facts[0] != facts[1]:
        raise _Left("its forward is not the same in train and eval mode (or under autocast or no_grad)")
    return graphs[0], tracers[0]


def _context() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    # saved_tensors_hooks, which checkpointing without reentrance is made of.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks


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
def _reporting_reads(tracer: _Tracer) -> Iterator[None]:
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
        raise _Left("its forward writes attributes")
    if drawn:
        raise _Left("its forward draws random numbers")


def _is_plain(value: object) -> bool:
    """Whether a changed value can be told from this one."""
    if isinstance(value, (tuple, frozenset)):
        return all(_is_plain(item) for item in value)
    return _is_flag(value) or inspect.isroutine(value) or isinstance(value, type)


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, _FLAGS)


# Rewriting.


class _Chain(NamedTuple):
    nodes: list[fx.Node]  # the batch norm first, the one that is replaced last
    residual: fx.Node | None
    in_place: bool  # whether the sum was
    relu: bool
    parts: dict[Path, type]


def _rewrite(
    graph: fx.Graph, module: nn.Module, candidates: dict[str, Path]
) -> tuple[dict[str, tuple[str, str]], dict[Path, type]]:
    """Fuse in place what the graph allows. Returns (fused, why) of each layer called, and what was relied on."""
    outcomes: dict[str, tuple[str, str]] = {}
    parts: dict[Path, type] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in candidates:
            continue
        fused, why = outcomes.get(node.target, ("", ""))
        try:
            chain = _chain(node, module)
            _check_order(chain, graph, module)
        except _Left as left:
            outcomes[node.target] = fused, why or str(left)
            continue
        _replace(chain, graph)
        parts.update(chain.parts)
        new = "+".join(["add"] * (chain.residual is not None) + ["relu"] * chain.relu)
        outcomes[node.target] = (fused if new in fused.split(", ") else ", ".join(filter(None, (fused, new)))), why
    return outcomes, parts


def _chain(node: fx.Node, module: nn.Module) -> _Chain:
    """The longest run of sum and ReLU after a batch norm that no one looks into."""
    if node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        raise _Left("it is not called with one tensor")
    path = tuple(node.target.split("."))
    layer = _at(module, path)
    parts: dict[Path, type] = {path: type(layer)}
    if isinstance(layer, TwinBatchNormAct2d):
        parts[(*path, "act")] = nn.Identity
    nodes, best, residual, in_place = [node], None, None, False
    while True:
        last = nodes[-1]
        try:
            user = _only_user(last)
        except _Left:
            if best:
                break
            raise
        nodes.append(user)
        if user.op == "call_module":
            path = tuple(user.target.split("."))
            kind = type(_at(module, path))
            if kind in (nn.Identity, nn.ReLU) and is_untouched(_at(module, path), kind):
                parts[path] = kind
                if kind is nn.ReLU:
                    best = _Chain(nodes, residual, in_place, True, parts)
                    break
                continue
        elif _is_relu(user):
            best = _Chain(nodes, residual, in_place, True, parts)
            break
        elif residual is None and _is_sum(user):
            in_place = _SUM[user.target]
            first, second = user.args
            residual = second if first is last else first
            if residual is last or not isinstance(residual, fx.Node):
                raise _Left("no other tensor is added to it")
            if in_place and first is not last:
                raise _Left("it is added into another tensor in place")
            best = _Chain(list(nodes), residual, in_place, False, dict(parts))
            continue
        break
    if best is None:
        raise _Left(_describe(nodes[-1], module))
    return best


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise _Left(f"its result is used {len(node.users)} times" if node.users else "its result is not used")
    return next(iter(node.users))


def _is_relu(node: fx.Node) -> bool:
    return node.target in _RELU and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}


def _is_sum(node: fx.Node) -> bool:
    return node.target in _SUM and len(node.args) == 2 and not node.kwargs


def _describe(user: fx.Node, module: nn.Module) -> str:
    if user.op == "output":
        return f"{type(module).__name__} returns its result"
    if user.op != "call_module":
        return f"{getattr(user.target, '__name__', user.target)} follows it"
    child = _at(module, tuple(user.target.split(".")))
    if isinstance(child, TwinBatchNorm2d):
        return f"{user.target} adds its result, as its residual"
    return f"{type(child).__name__}{' with hooks' if has_hooks(child) else ''} follows it"


def _check_order(chain: _Chain, graph: fx.Graph, module: nn.Module) -> None:
    """The batch norm moves to where the chain ends: nothing on the way may write what it reads, or run it too."""
    order = list(graph.nodes)
    start, end = order.index(chain.nodes[0]), order.index(chain.nodes[-1])
    layer = _at(module, tuple(chain.nodes[0].target.split(".")))
    summed = end
    for node in chain.nodes:
        if chain.residual in node.all_input_nodes:
            summed = order.index(node)
    read = _memory(chain.nodes[0].args[0], module)
    for position in range(start + 1, end):
        node = order[position]
        if node in chain.nodes or node.target is getattr or not node.op.startswith("call_"):
            continue
        if node.op == "call_module" and layer in _at(module, tuple(node.target.split("."))).modules():
            raise _Left(f"{node.target} runs it too before the sum")
        if _is_pure(node, module):
            continue
        if position > summed:
            read = read | _memory(chain.residual, module)
        if any(_memory(value, module) & read for value in node.all_input_nodes):
            raise _Left(f"{node.target} might write what it reads before the sum")


def _is_pure(node: fx.Node, module: nn.Module) -> bool:
    return node.op == "call_module" and is_untouched(_at(module, tuple(node.target.split("."))), *_PURE)


def _memory(node: fx.Node, module: nn.Module) -> set[fx.Node]:
    """The values that ``node`` may share memory with, itself included."""
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if not _is_pure(node, module):
            waiting += node.all_input_nodes
    return found


def _replace(chain: _Chain, graph: fx.Graph) -> None:
    norm, last = chain.nodes[0], chain.nodes[-1]
    arguments = norm.args if chain.residual is None else (*norm.args, chain.residual)
    with graph.inserting_before(last):
        new = graph.call_module(norm.target, arguments, {"relu": True} if chain.relu else {})
        if chain.in_place:  # a sum in place keeps the dtype of the batch norm, whatever is added
            new = graph.call_method("type_as", (new, norm.args[0]))
    last.replace_all_uses_with(new)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _compiled(graph: fx.Graph, module: nn.Module) -> Callable:
    graph.lint()
    for node in graph.nodes:
        node.type = None  # annotations may name what only the original source knows
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), scope)
    return scope["forward"]
