"""A model's evaluation forward as a list of nodes: ``torch.export``, then patterns."""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from twins_fast.attacks.engine.derivatives import differentiable_functions, without_own_backward
from twins_fast.attacks.engine.graph import (
    Reading,
    arguments,
    aten,
    draws_nothing,
    is_aten,
    is_switched_off,
    module_of,
    shape_of,
    share_memory,
)
from twins_fast.attacks.engine.nodes import (
    Call,
    Derived,
    Node,
    NotCaptured,
    Param,
    Ref,
    as_float32,
    in_one_line,
    map_values,
    tensor_of,
    tensors_of,
)
from twins_fast.attacks.engine.patterns import PATTERNS, Match, several, twin_batch_norm
from twins_fast.attacks.engine.per_sample import keeps_samples_apart
from twins_fast.models.output import Output, output_of
from twins_fast.nn.guards import computed_by_hooks, random_numbers_restored
from twins_fast.nn.modes import in_mode, modules_of

_SAME = {
    aten.contiguous.default, aten.resolve_neg.default, aten.resolve_conj.default, aten.clone.default,
    aten.alias.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_SAME_IF_ALIKE = {aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
_FILLED = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
_ABOUT_MEMORY = {"as_strided", "sym_stride", "stride", "sym_storage_offset", "storage_offset"}
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}


def capture(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device, output: Output, numbers: dict[str, str]
) -> list[Node]:
    """The nodes of ``model`` in eval mode for float32 images [N, *shape], N >= 2; the last one gives the logits.

    Args:
        output: which of its results those are.
        numbers: gets the values of buffers by which the forward may choose what it does, which the result, or the
            refusal, is for; see :func:`values_of`.

    Raises:
        NotCaptured: control flow that depends on values or on N, operations that change the model or draw random
            numbers, backward passes of the model's own, something other than logits [N, classes].
    """
    try:
        return _nodes(model, shape, device, output)
    except DependsOnValues as first:
        read: set[str] = set()
        try:
            with _as_numbers(model, read):
                return _nodes(model, shape, device, output)
        except NotCaptured as error:
            if isinstance(error.__cause__, (AttributeError, TypeError)):  # a number will not do
                raise first from error
            raise
        finally:
            numbers |= values_of(model, sorted(read))


def _nodes(model: nn.Module, shape: tuple[int, int, int], device: torch.device, output: Output) -> list[Node]:
    images = torch.zeros(2, *shape, dtype=torch.float32, device=device, requires_grad=True)
    with in_mode(model, training=False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        functions: set[type] = set()
        try:
            exported, changed = _exported(model, images, functions)
        except OwnBackward:
            with random_numbers_restored():
                functions = differentiable_functions(model, images.detach() + 0.5)
            if not functions:
                raise
            exported, changed = _exported(model, images, functions)
        if changed:  # perhaps it only keeps at its first call what later ones need
            with torch.no_grad(), random_numbers_restored():
                model(images)
            exported, changed = _exported(model, images, functions)
    if changed:
        raise NotCaptured(f"the forward changes the model, which it must not in eval mode: {changed}"[:200])
    return _read(model, exported, shape, output)


def _read(
    model: nn.Module, exported: torch.export.ExportedProgram, shape: tuple[int, int, int], output: Output
) -> list[Node]:
    """The nodes of the graph, or, where that writes to views and copies, of an equal one that writes nowhere."""
    try:
        return Reader(model, exported, shape, output).nodes
    except WritesToCopy as refusal:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                functional = exported.run_decompositions({})  # takes longer than the export itself
        except Exception as error:  # of all kinds, as an export's
            raise refusal from error
        for spec in functional.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise NotCaptured(f"the forward changes {spec.target}") from refusal
        return Reader(model, functional, shape, output).nodes


class OwnBackward(NotCaptured):
    """The model has a backward pass of its own."""


class WritesToCopy(NotCaptured):
    """The forward writes in place to a view or a copy of a value, for which the value itself is taken here."""


class DependsOnValues(NotCaptured):
    """What the model does depends on values of tensors."""


def values_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of buffers without dimensions, in a form in which NaN is equal to itself; nothing if one is gone."""
    found = {name: tensor_of(model, name) for name in names}
    tensors = [t.detach().double() for t in found.values() if t is not None and t.dim() == 0]
    if not tensors or len(tensors) < len(found):
        return {}
    return dict(zip(found, map(repr, torch.stack(tensors).tolist()), strict=True))


class _Integer(int):
    """As a buffer without dimensions gives it."""

    def item(self) -> int:
        return int(self)


class _Float(float):
    """As a buffer without dimensions gives it."""

    def item(self) -> float:
        return float(self)


@contextmanager
def _as_numbers(model: nn.Module, read: set[str]) -> Iterator[None]:
    """Have the buffers without dimensions be Python's numbers; ``read`` gets the names of those that are read."""
    own = [(name, m) for name, m in model.named_modules() if not type(m).__module__.startswith("torch.")]
    found = [(name, m, key) for name, m in own for key, t in m._buffers.items() if t is not None and t.dim() == 0]
    numbers = {  # an export stands proxies in for modules, which share their buffers
        (id(m._buffers), key): (
            f"{name}.{key}".lstrip("."),
            (_Float if m._buffers[key].is_floating_point() else _Integer)(m._buffers[key]),
        )
        for name, m, key in found
    }
    thread = threading.get_ident()

    def look_up(key: str, module: nn.Module) -> Any:
        known = numbers.get((id(module._buffers), key))
        if known is None or threading.get_ident() != thread:
            return module._buffers[key]
        read.add(known[0])
        return known[1]

    with ExitStack() as stack:
        for kind, key in {(type(m), key) for _, m, key in found}:
            stack.enter_context(mock.patch.object(kind, key, property(functools.partial(look_up, key)), create=True))
        yield


def _exported(model: nn.Module, images: torch.Tensor, functions: set[type]) -> tuple[torch.export.ExportedProgram, str]:
    """The exported forward, and what it changes; backward passes of ``functions`` are derivatives, and left out."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # takes seconds, as an export does

    batch: Any = {0: torch.export.Dim.DYNAMIC}
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    shapes = ((batch,),) if first is not None and first.kind is first.VAR_POSITIONAL else (batch,)
    with _watched(functions) as messages, _without_strangers(model):
        try:
            exported = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        except NotCaptured:
            raise
        except GuardOnDataDependentSymNode as error:
            raise DependsOnValues(in_one_line(error)) from error
        except Exception as error:  # export raises errors of all kinds
            if "Constraints violated" in str(error):
                raise NotCaptured(
                    "the forward needs the number of images as an int, as len(x) or int() give it: use x.shape[0], //"
                ) from error
            raise NotCaptured(in_one_line(error)) from error
    names = {f"{name}.{own}".lstrip(".") for name, m in model.named_modules() for own in _put_back(m)}
    said = [text for m in messages if "assigned during export" in (text := str(m.message).splitlines()[0])]
    return exported, next((t for t in said if not names.issuperset(re.findall(r"self\.([\w.]*\w)", t))), "")


def _put_back(module: nn.Module) -> set[str]:
    """Attributes that are other ones during an export, and no change of the model."""
    weights = {"_flat_weights"} if isinstance(module, nn.RNNBase) else set()
    return weights | computed_by_hooks(module)


@contextmanager
def _watched(functions: set[type]) -> Iterator[list[warnings.WarningMessage]]:
    """Refuse what an exported graph would silently lack, keep the export quiet, and yield its warnings."""

    def own_backward(*arguments, **keywords):
        raise OwnBackward("a backward pass of its own (torch.autograd.Function or a hook on a tensor)")

    from torch.export import _trace

    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    hooks = mock.patch.object(torch.Tensor, "register_hook", own_backward)
    silence = mock.patch.object(_trace, "print", lambda *text, **where: None, create=True)  # of graphs
    log.setLevel(logging.CRITICAL)
    try:
        with random_numbers_restored() as drawn:
            with warnings.catch_warnings(record=True) as messages, hooks, silence:
                with without_own_backward(functions, own_backward):
                    warnings.simplefilter("always")
                    yield messages
        if drawn:
            raise NotCaptured("the forward draws random numbers: have it draw none in eval mode")
    finally:
        log.setLevel(level)


@contextmanager
def _without_strangers(model: nn.Module) -> Iterator[None]:
    """Refuse networks that are called and are no part of the model: their parameters would become constants."""
    # An export stands proxies in for modules that have several names, which share what these hold.
    own = {id(module._parameters) for module in modules_of(model)}
    thread, call = threading.get_ident(), nn.Module._call_impl

    def is_strange(module: nn.Module) -> bool:
        return id(module._parameters) not in own

    def checked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and is_strange(module):  # an export calls a wrapper of the model, too
            if any((m._parameters or m._buffers) and is_strange(m) for m in module.modules()):
                kind = type(module).__name__
                raise NotCaptured(f"it calls a {kind} that is no part of it: make it an attribute of the model")
        return call(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "_call_impl", checked):
        yield


def _exact(target: Callable, device: str) -> Callable:
    """``target`` outside autocast, in float32."""

    @functools.wraps(target, updated=())
    def run(*arguments: Any, **keywords: Any) -> Any:
        wide = pytree.tree_map_only(torch.Tensor, as_float32, (arguments, keywords))
        with torch.autocast(device, enabled=False):
            return target(*wide[0], **wide[1])

    return run


def _copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``aten.copy``, which autograd does not know."""
    return source.to(target.dtype).expand_as(target)


_INSTEAD = {
    aten.view.default: aten.reshape.default,  # memory may be laid out otherwise than it was in the export
    aten._unsafe_view.default: aten.reshape.default,
    aten.copy.default: _copied,
}


class Reader(Reading):
    """Turns an exported graph into nodes."""

    def __init__(
        self, model: nn.Module, exported: torch.export.ExportedProgram, shape: tuple[int, ...], output: Output = None
    ):
        super().__init__(model, [Node("input", [], tuple(shape), "")], {})
        self.shared: set[fx.Node] = set()  # nodes whose memory another value may share
        self._bind(exported)
        self.exactly: str | None = None  # the kind of device where autocast is switched off
        result = None
        for node in exported.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = getattr(exported.graph_module, node.target)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                result = output_of(pytree.tree_unflatten(node.args[0], exported.call_spec.out_spec), output)
            elif node.op != "placeholder":
                raise NotCaptured(f"{node.op} {node.target}")
        last = self.values.get(result) if isinstance(result, fx.Node) else None
        if not isinstance(last, Ref) or last.index == 0:
            raise NotCaptured("the model returns no single tensor that depends on the images: output= of PGD names it")
        if self.nodes[last.index].shape is None or len(self.nodes[last.index].shape) != 1:
            raise NotCaptured("the model returns no logits [N, classes]: output= of PGD names them")
        self._keep_until(last.index)

    def _bind(self, exported: torch.export.ExportedProgram) -> None:
        placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        known = {id(t) for _, t in tensors_of(self.model)}
        for spec in exported.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.values[node] = Ref(0)
                sizes = node.meta["val"].shape[0].node.shape_env
                # PyTorch 2.6 asks of every slice of the images whether there are as many as integers reach.
                conditions = [guard.expr for guard in sizes.guards if not guard.expr.has(sys.maxsize)]
                if conditions or sizes.replacements:
                    condition = conditions[0] if conditions else sizes.replacements
                    raise NotCaptured(f"the forward depends on the number of images: {condition}"[:200])
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.values[node] = Param(spec.target)
            else:
                tensor = tensor_of(self.model, spec.target)
                if tensor is not None and id(tensor) in known:
                    self.values[node] = Param(spec.target)
                else:  # made by the forward, or from a global or a closure, which Watch looks at
                    self.values[node] = exported.constants[spec.target].detach()

    def _call(self, node: fx.Node) -> None:
        target, value = node.target, self.value
        if target is torch.ops.higher_order.wrap_with_autocast:
            self._without_autocast(node)
            return
        if node.all_input_nodes and all(isinstance(value(n), torch.Tensor) for n in node.all_input_nodes):
            self.values[node] = target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))
            return
        if target in _FILLED and all(isinstance(size, int) for size in node.args[1]):
            like = node.args[0].meta["val"]  # of which nothing but this is taken
            empty = torch.empty(0, dtype=like.dtype, device=like.device)
            self.values[node] = target(empty, *node.args[1:], **node.kwargs)
            return
        if target is operator.getitem and type(value(node.args[0])) is tuple:
            parts = value(node.args[0])
            self.values[node] = parts[node.args[1]]
            return
        if target is torch.ops.twins_fast.twin_bn_forward.default:
            self.values[node] = twin_batch_norm(self, node)
            return
        if isinstance(target, torch._ops.OpOverload):
            if target in _CHECKS:
                return
            if torch.Tag.nondeterministic_seeded in target.tags and not draws_nothing(node):
                raise NotCaptured(f"{module_of(node)}: {target} draws random numbers: have it draw none in eval mode")
            node = self._functional(node)
            if node is None:
                return
            target = node.target
        elif not (callable(target) and target.__module__ in ("_operator", "operator", "math")):
            raise NotCaptured(f"{module_of(node)}: {target}")
        if target is aten._native_batch_norm_legit_no_training.default:  # in a graph that writes nowhere
            *operands, momentum, eps = node.args
            plain = self._call_instead(node, aten.batch_norm.default, (*operands, False, momentum, eps, False))
            self.values[node] = (self.values[plain], None, None)
            return
        if _is_overwritten(node):
            self.values[node] = value(node.args[1])
            return
        same = target in _SAME or is_switched_off(node) or _is_whole(node)
        if same or (target in _SAME_IF_ALIKE and _alike(node.args[0], node)):
            self.values[node] = value(node.args[0])
            if not is_switched_off(node) and not share_memory(node, node.args[0]):
                self.shared |= {node, node.args[0]}  # a copy: a write to either would have to tell them apart
            return
        if all(isinstance(value(n), (torch.Tensor, Param, Derived)) for n in node.all_input_nodes):
            self.values[node] = Derived(self._call_of(node))
            return
        if is_aten(target) and target._schema.name.partition("::")[2] in _ABOUT_MEMORY:
            raise NotCaptured(f"{module_of(node)}: {target} looks at how memory is laid out")
        if target is aten.sym_size.int and self.is_batched(value(node.args[0])) and node.args[1] == 0:
            self.nodes.append(Node("rows", [], None, module_of(node), dtype=None))
            self.values[node] = Ref(len(self.nodes) - 1)
            return
        pattern = PATTERNS.get(target._schema.name.partition("::")[2]) if is_aten(target) else None
        planned = is_aten(target) and self.exactly is None
        results = several(self, node) if planned else None
        if results is not None:
            self.values[node] = results
            return
        match = pattern(self, node) if pattern and planned else None
        self.values[node] = self._planned(node, match) if match else self._generic(node)

    def _without_autocast(self, node: fx.Node) -> None:
        """A block that says so itself is computed in float32 by PyTorch."""
        device, _, enabled, _, body, *operands = node.args
        if enabled or self.exactly is not None:
            raise NotCaptured(f"{module_of(node)}: autocast inside the forward")
        self.exactly, given = device, iter(operands)
        for inner in self.value(body).graph.nodes:
            if inner.op == "placeholder":
                self.values[inner] = self.value(next(given))
            elif inner.op == "call_function":
                self._call(inner)
            elif inner.op == "output":
                self.values[node] = tuple(self.value(result) for result in inner.args[0])
            else:
                raise NotCaptured(f"{inner.op} {inner.target}")
        self.exactly = None

    def _functional(self, node: fx.Node) -> fx.Node | None:
        """An operation that does not write; one in place is replaced, and later readers get its result."""
        schema = node.target._schema
        written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if not written or is_switched_off(node):
            passed = node.target in _SAME | _SAME_IF_ALIKE or is_switched_off(node) or _is_whole(node)
            if any(r.alias_info is not None for r in schema.returns) and not passed:
                self.shared |= {node, *node.all_input_nodes}  # a view
            return node
        subject = node.args[0]
        value = self.value(subject)
        name = schema.name.partition("::")[2]
        plain = getattr(getattr(aten, name.removesuffix("_"), None), node.target._overloadname, None)
        if written != [0] or not name.endswith("_") or plain is None:
            raise NotCaptured(f"{module_of(node)}: {node.target} writes to its operands")
        if not isinstance(value, Derived) and (not isinstance(value, Ref) or value.index == 0):
            changed = value.name if isinstance(value, Param) else "the images or a copy of them"
            refusal = NotCaptured if subject.op == "placeholder" else WritesToCopy  # themselves, or a copy
            raise refusal(f"{module_of(node)}: {node.target} changes {changed}")
        if subject in self.shared:
            raise WritesToCopy(f"{module_of(node)}: {node.target} writes to memory that another value shares")
        functional = self._call_instead(node, plain, node.args, node.kwargs)
        for name in (node, *[name for name, known in self.values.items() if known == value]):
            self.values[name] = self.values[functional]
        return None

    def _call_instead(self, node: fx.Node, target: Callable, args: tuple, kwargs: dict | None = None) -> fx.Node:
        """A node in place of another one, whose first result, or only one, it gives."""
        with node.graph.inserting_before(node):
            other = node.graph.call_function(target, args, kwargs)
        first = node.meta["val"]
        other.meta = node.meta | {"val": first[0] if isinstance(first, tuple | list) else first}
        self._call(other)
        return other

    def _planned(self, node: fx.Node, match: Match) -> Ref:
        inputs = [ref.index for ref in match.inputs]
        return self._append(node, match.op, inputs, match.options, match.call or self._call_of(node), per_sample=True)

    def _call_of(self, node: fx.Node) -> Call:
        target = _INSTEAD.get(node.target, node.target)
        if self.exactly is not None:
            target = _exact(target, self.exactly)
        return target, *fx.node.map_arg((node.args, node.kwargs), self.value)

    def _append(self, node: fx.Node, op: str, inputs: list[int], options: dict, call: Call, per_sample: bool) -> Ref:
        dtype = getattr(node.meta.get("val"), "dtype", None)
        self.nodes.append(Node(op, inputs, shape_of(node), module_of(node), per_sample, options, call, dtype))
        return Ref(len(self.nodes) - 1)

    def _generic(self, node: fx.Node) -> Ref:
        """An operation that is not planned, with its arguments unchanged."""
        operands = [self.value(n) for n in node.all_input_nodes]
        refs = [v.index for v in operands if isinstance(v, Ref)]
        name = node.target._schema.name.partition("::")[2] if is_aten(node.target) else ""
        shapes = [self.nodes[index].shape for index in refs if self.nodes[index].op != "rows"]
        batched = bool(shapes) and None not in shapes and shape_of(node) is not None
        per_sample = batched and keeps_samples_apart(self, node, name, shapes)
        return self._append(node, "call", refs, {}, self._call_of(node), per_sample)

    def _keep_until(self, last: int) -> None:
        del self.nodes[last + 1 :]
        needed = {last}
        for index in range(last, 0, -1):
            if index in needed:
                needed.update(self.nodes[index].inputs)
        if 0 not in needed:
            raise NotCaptured("the logits do not depend on the images")
        places = {old: new for new, old in enumerate(sorted(needed))}

        def moved(value):
            return Ref(places[value.index]) if isinstance(value, Ref) else value

        remaining = [self.nodes[old] for old in sorted(needed)]
        for node in remaining:
            node.inputs = [places[index] for index in node.inputs]
            if node.call is not None:
                node.call = (node.call[0], *map_values(moved, node.call[1:]))
        self.nodes[:] = remaining


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return a.dtype == b.dtype and a.device == b.device


def _is_overwritten(node: fx.Node) -> bool:
    """Nothing of the first operand is left, so that the result is the second one."""
    if node.target not in (aten.slice_scatter.default, aten.copy.default):
        return False
    source = node.args[1]
    return source.meta["val"].shape == node.meta["val"].shape and _alike(source, node)


def _is_whole(node: fx.Node) -> bool:
    """A slice of everything."""
    if node.target is not aten.slice.Tensor:
        return False
    _, dim, start, end, step = arguments(node, lambda v: v)
    size = node.args[0].meta["val"].shape[dim]
    return start in (None, 0) and step == 1 and (end is None or end == sys.maxsize or end == size)
