"""Fused modules: a subclass whose forward is the rewritten graph while what the trace proved still holds.

A network says what follows a batch norm only in its forward. So the forward of every module that holds
two-wing layers is traced, and where the trace proves that nothing else sees the intermediate results, the
module gets a subclass of its own class whose forward passes residual and ReLU to the layer. The layers
themselves do not change: called by anyone else they do what they did.

What the trace assumed about the module is checked at every call (:meth:`_Plan.holds`); when it has
changed, the original forward runs.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import fx, nn

from twins_fast.nn.fuse.children import Path, at, children, owners, twin_children
from twins_fast.nn.fuse.rewrite import is_pure, obstacle, rewrite
from twins_fast.nn.fuse.trace import NotFused, trace
from twins_fast.nn.guards import is_untouched
from twins_fast.nn.layers import TwinBatchNormAct2d, TwoWingBatchNorm2d
from twins_fast.nn.wings import require_two_wing_layers

_tracing = threading.RLock()  # fx and the tracer replace methods of nn.Module while they trace


class Fusion(NamedTuple):
    """What is fused with one two-wing layer, and why no more."""

    layer: str  # name in the network
    fused: str  # what runs in the same call: "relu", "add", "add+relu"; "" for nothing
    why: str  # the reason, where nothing or not everything is fused, or not for every input

    def __str__(self) -> str:
        return f"{self.layer}: {self.fused or 'left alone'}{self.why and f' ({self.why})'}"


def fuse_twin_bn(model: nn.Module) -> nn.Module:
    """Run batch norm, residual sum and ReLU of ``model`` as one call wherever that provably changes nothing.

    In place; :func:`fusion_report` lists what was fused with every layer, :func:`twins_fast.revert_twin_bn`
    undoes it, a second call changes nothing. Parameters, buffers, state dict, hooks, children and
    ``isinstance`` stay; copies are fused too. A fused module pickles as what it was before: fuse it again after
    loading. With the torch backend results are the same to the bit.

    A forward is left alone when it cannot be traced or is not the same in train and eval mode, with and
    without gradients or autocast. The original forward runs while a fused layer has hooks, when an attribute
    that it reads has changed (``grad_checkpointing``, say) or a child has been replaced, and when it is called
    with keyword or optional arguments. A forward that asks whether an argument is a tensor is fused for lists
    of tensors, which is what a DenseNet's layers get. What cannot be noticed: module globals that change
    later, side effects on them (printing), hooks on all modules of the process, and comparisons of values with
    ``is`` or ``type()``. The class of a fused module is a subclass of what it was.
    While this runs, and :func:`fusion_report`, no other thread may use the model.

    As in train mode, results of the kernels can then be differentiated once in eval mode too.

    Args:
        model: a network with two-wing layers (:func:`twins_fast.convert_twin_bn`).

    Raises:
        ValueError: a model without two-wing layers.
    """
    require_two_wing_layers(model)
    for _, module in owners(model):
        _fuse(module)
    return model


def fusion_report(model: nn.Module) -> list[Fusion]:
    """One row per two-wing layer of ``model``, in the network's order. Nothing is changed.

    Raises:
        ValueError: a model without two-wing layers.
    """
    require_two_wing_layers(model)
    rows = []
    if isinstance(model, TwoWingBatchNorm2d):
        rows.append(Fusion("", *_alone(model, "it is the model itself")))
    for prefix, owner in owners(model):
        plan, fresh = getattr(type(owner), "plan", None), False
        if plan is None or not plan.holds(owner):
            with _unfused(owner):
                plan, fresh = _Plan(owner), True
        for path, (fused, why) in plan.rows.items():
            if fresh and path in plan.rewritten:
                fused, why = "", f"{fused} can be fused: call fuse_twin_bn"
            rows.append(Fusion(".".join(filter(None, (prefix, *path))), fused, why))
    return rows


def unfused_type(module: nn.Module | None) -> type[Any]:
    """The class that a module had before :func:`twins_fast.fuse_twin_bn`."""
    return type(module).__dict__.get("unfused_type", type(module))


def _subclass(original: type[nn.Module], extra: dict[str, Any]) -> type[nn.Module]:
    """A subclass that looks like ``original``; with one base, which is what allows modules to change to it."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    metaclass: Callable[..., type[nn.Module]] = type(original)
    return metaclass(original.__name__, (original,), {**names, "unfused_type": original, **extra})


@contextmanager
def _unfused(module: nn.Module) -> Iterator[None]:
    fused = type(module)
    module.__class__ = unfused_type(module)
    try:
        yield
    finally:
        module.__class__ = fused


def _copied(module: nn.Module, copy_: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with _unfused(module):
        twin = copy_(module)
    twin.__class__ = type(module)
    return twin


def _reduce(module: nn.Module, protocol: int) -> str | tuple[Any, ...]:
    with _unfused(module):
        reduced = module.__reduce_ex__(protocol)
    if isinstance(reduced, str):  # the name of a global
        return reduced
    make, arguments, *state = reduced
    return functools.partial(make, *arguments), (), *state  # pickle would compare a plain make with the fused class


def _fuse(module: nn.Module) -> None:
    plan = getattr(type(module), "plan", None)
    if plan is not None and (plan.holds(module) or "plan" not in type(module).__dict__):
        return  # the latter: someone else's subclass of a fused class
    module.__class__ = original = unfused_type(module)
    plan = _Plan(module)
    run = plan.run
    if run is None:
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fits = not kwargs and plan.takes(args) and plan.holds(self)
        return run(self, *args) if fits else original.forward(self, *args, **kwargs)

    # With a code object of its own torch.compile counts its compilations apart from those of other modules.
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    methods = {
        "forward": functools.wraps(original.forward)(own),
        "__copy__": lambda self: _copied(self, copy.copy),
        "__deepcopy__": lambda self, memo: _copied(self, lambda module: copy.deepcopy(module, memo)),
        "__reduce_ex__": _reduce,
    }
    with suppress(TypeError):  # a class that forbids such a subclass stays as it is
        module.__class__ = _subclass(original, {"plan": plan, **methods})


def _alone(layer: TwoWingBatchNorm2d, why: str) -> tuple[str, str]:
    """What a layer does in one call by itself, and why not more."""
    if type(layer) is TwinBatchNormAct2d and type(layer.act) is not nn.Identity:
        if not layer.fuses_act():
            return "", f"its drop and {type(layer.act).__name__} are computed after it"
        return "relu", ""
    return "", why


class _Plan:
    """How a module's forward is fused, and what that assumes.

    Attributes:
        rows: for every layer (fused, why), as in :class:`Fusion`.
        rewritten: the layers that the new forward calls with residual or ReLU.
        run: the new forward; None if there is nothing to rewrite.
    """

    def __init__(self, module: nn.Module):
        self.rows: dict[Path, tuple[str, str]] = {}
        self.rewritten: set[Path] = set()
        self.run: Callable[..., Any] | None = None
        self._takes_list: list[bool] = []  # for each argument
        self._attributes: dict[str, object] = {}
        self._methods: dict[str, object] = {}
        self._tensors: set[str] = set()
        self._forward = type(module).forward
        self._children = children(module)
        self._types: dict[Path, type] = {}  # of what the forward calls
        self._parts: dict[Path, type] = {}  # modules that must stay of this very type, and without hooks
        candidates = {}
        for path, layer in twin_children(module).items():
            why = obstacle(layer)
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
                why = str(error) if isinstance(error, NotFused) else f"its forward cannot be traced: {error}"
                why = f"{type(module).__name__}: {' '.join(why.split())}"
                self.rows.update({path: ("", why) for path in candidates.values()})
                self.rewritten, self.run = set(), None

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` still is what was traced."""
        for name, expected in self._attributes.items():
            if not _same(getattr(module, name, None), expected):
                return False
        if any(getattr(module, name, None) is None for name in self._tensors):
            return False
        if unfused_type(module).forward is not self._forward or children(module) != self._children:
            return False
        for name, expected in self._methods.items():
            if name in module.__dict__ or not _same(getattr(type(module), name, None), expected):
                return False
        if any(unfused_type(at(module, path)) is not kind for path, kind in self._types.items()):
            return False
        return all(is_untouched(at(module, path), kind) for path, kind in self._parts.items())

    def takes(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the forward was traced for arguments like these."""
        return len(arguments) == len(self._takes_list) and all(
            type(argument) is list if takes_list else argument is not None
            for argument, takes_list in zip(arguments, self._takes_list, strict=True)
        )

    def _trace(self, module: nn.Module, candidates: dict[str, Path]) -> None:
        if "forward" in module.__dict__:
            raise NotFused("its forward was replaced on the object")
        graph, tracer = trace(module)
        self._takes_list = [name in tracer.lists for name in tracer.arguments]
        self._attributes, self._methods, self._tensors = tracer.attributes, tracer.methods, tracer.tensors
        for node in graph.nodes:
            if node.op == "call_module":
                path = tuple(node.target.split("."))
                self._types[path] = unfused_type(at(module, path))
                if is_pure(node, module):
                    self._parts[path] = type(at(module, path))
        outcomes, parts = rewrite(graph, module, candidates)
        self._parts.update(parts)
        for name, path in candidates.items():
            fused, why = outcomes.get(name, ("", "its forward does not call it"))
            if fused:
                self.rewritten.add(path)
                why = why or ("where the forward gets a list" if tracer.lists else "")
            self.rows[path] = fused, why
        if self.rewritten:
            self.run = _compiled(graph, module)


def _same(value: object, expected: object) -> bool:
    return value is expected or (type(value) is type(expected) and value == expected)


def _compiled(graph: fx.Graph, module: nn.Module) -> Callable[..., Any]:
    graph.lint()
    for node in graph.nodes:
        node.type = None  # annotations may name what only the original source knows
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), scope)
    return scope["forward"]
