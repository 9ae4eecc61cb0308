"""A model's evaluation forward as a list of nodes: ``torch.export``, then one name for each thing that is planned."""

from __future__ import annotations

import logging
import operator
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from twins_fast.models.clamp import clamp, torch_passes_at_bounds
from twins_fast.nn.modes import in_mode

aten = torch.ops.aten


class NotCaptured(Exception):
    """The model cannot be captured; the message says why."""


class Param(NamedTuple):
    """A parameter, buffer or tensor attribute, by its name in the model: looked up anew at every attack."""

    name: str


class Ref(NamedTuple):
    """The result of a node, by its index."""

    index: int


@dataclass
class Node:
    """One operation.

    Attributes:
        op: ``conv``, ``linear``, ``batch_norm``, ``relu``, ``add``, ``max_pool``, ``avg_pool``, ``flatten``; on the
            image alone also ``upsample``, ``clamp``, ``arithmetic``; ``input``; ``rows`` (the number of images);
            ``call`` (any other ATen operation, kept as it is).
        inputs: the nodes whose gradient it passes on.
        shape: of its result without the batch; None if that is no tensor led by the batch.
        where: the module that it comes from.
        each_row: whether a row of the batch decides alone about its row of the result.
        options: what the operation needs to know, Params included.
        call: the ATen operation itself with its arguments, in which results of nodes are Refs.
        dtype: of its result; None if that is no tensor.
    """

    op: str
    inputs: list[int]
    shape: tuple[int, ...] | None
    where: str
    each_row: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    call: tuple[Any, tuple, dict] | None = None
    dtype: torch.dtype | None = torch.float32


_SAME = {
    aten.contiguous.default, aten.resolve_neg.default, aten.resolve_conj.default, aten.clone.default,
    aten.alias.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_SAME_IF_ALIKE = {aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
_ABOUT_MEMORY = {"as_strided", "sym_stride", "stride", "sym_storage_offset", "storage_offset"}
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}
# Operations of which every row of the result takes the same row of the operands alone, if all are led by the batch.
_EACH_ROW = {
    "relu", "relu6", "hardtanh", "clamp", "silu", "sigmoid", "tanh", "gelu", "elu", "leaky_relu", "hardswish", "prelu",
    "hardsigmoid", "mish", "softplus", "exp", "log", "sqrt", "rsqrt", "pow", "neg", "abs", "add", "sub", "mul", "div",
    "conv2d", "conv_transpose2d", "pixel_shuffle", "layer_norm", "group_norm", "linear", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
_ARITHMETIC = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div"}


def capture(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> list[Node]:
    """The nodes of ``model`` in eval mode for float32 images [N, *shape], N >= 2; the last one gives the logits.

    Raises:
        NotCaptured: control flow that depends on values or on N, operations that change the model or draw random
            numbers, backward passes of the model's own, something other than logits [N, classes].
    """
    images = torch.zeros(2, *shape, dtype=torch.float32, device=device, requires_grad=True)
    with _watched() as messages:
        try:
            with in_mode(model, training=False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                batch = torch.export.Dim.DYNAMIC
                exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
        except NotCaptured:
            raise
        except Exception as error:  # export raises errors of all kinds
            lines = str(error).strip().splitlines()
            raise NotCaptured(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]) from error
    for message in messages:
        if "assigned during export" in str(message.message):
            raise NotCaptured(f"the forward changes the model: {str(message.message).splitlines()[0][:150]}")
    return _Reader(model, exported, shape).nodes


@contextmanager
def _watched() -> Iterator[list[warnings.WarningMessage]]:
    """Refuse what an exported graph would silently lack, keep the export quiet, and give its warnings."""

    known = torch.autograd.Function.__dict__["apply"]

    def own_backward(function, *arguments, **keywords):
        if getattr(function, "__module__", "").startswith("twins_fast."):
            return known.__get__(None, function)(*arguments, **keywords)
        raise NotCaptured("a backward pass of its own (torch.autograd.Function or a hook on a tensor)")

    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, before = log.level, _random_states()
    patches = (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(own_backward)),
        mock.patch.object(torch.Tensor, "register_hook", own_backward),
    )
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as messages, patches[0], patches[1]:
            warnings.simplefilter("always")
            yield messages
        if any(old != new for old, new in zip(before[:3], _random_states()[:3], strict=True)):
            raise NotCaptured("the forward draws random numbers")
    finally:
        log.setLevel(level)
        random.setstate(before[0])
        numpy.random.set_state(before[3])
        torch.set_rng_state(before[4])


def _random_states() -> tuple:
    """Of Python, NumPy and PyTorch, as they compare; then those of NumPy and PyTorch themselves."""
    of_numpy, of_torch = numpy.random.get_state(), torch.get_rng_state()
    return random.getstate(), (of_numpy[1].tobytes(), of_numpy[2:]), of_torch.numpy().tobytes(), of_numpy, of_torch


class _Reader:
    """Turns an exported graph into nodes."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram, shape: tuple[int, ...]):
        self.model = model
        self.nodes = [Node("input", [], tuple(shape), "")]
        self.values: dict[fx.Node, Any] = {}  # fx node -> Ref, Param or number
        self.shared: set[fx.Node] = set()  # whose memory another value may see
        self._bind(exported)
        result = None
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder":
                raise NotCaptured(f"{node.op} {node.target}")
        last = self.values.get(result[0]) if len(result) == 1 else None
        if not isinstance(last, Ref) or last.index == 0:
            raise NotCaptured("the model does not return one tensor that depends on the images")
        if self.nodes[last.index].shape is None or len(self.nodes[last.index].shape) != 1:
            raise NotCaptured("the model does not return logits [N, classes]")
        self._keep_until(last.index)

    def _bind(self, exported: torch.export.ExportedProgram) -> None:
        placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        known = {id(t) for _, t in tensors_of(self.model)}
        for spec in exported.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.values[node] = Ref(0)
                sizes = node.meta["val"].shape[0].node.shape_env
                if sizes.guards or sizes.replacements:
                    found = sizes.guards[0].expr if sizes.guards else sizes.replacements
                    raise NotCaptured(f"the forward depends on the number of images: {found}"[:200])
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.values[node] = Param(spec.target)
            else:
                found = tensor_of(self.model, spec.target)
                if found is None or id(found) not in known:
                    raise NotCaptured(f"a tensor that is no parameter, buffer or attribute of a module ({spec.target})")
                self.values[node] = Param(spec.target)

    def _call(self, node: fx.Node) -> None:
        target, value = node.target, self._value
        if target is operator.getitem and type(value(node.args[0])) is tuple:
            parts = value(node.args[0])
            self.values[node] = parts[node.args[1]]
            return
        if target is torch.ops.twins_fast.twin_bn_forward.default:
            self.values[node] = self._twin_bn(node)
            return
        if isinstance(target, torch._ops.OpOverload):
            if target in _CHECKS:
                return
            if torch.Tag.nondeterministic_seeded in target.tags and not _draws_nothing(node):
                raise NotCaptured(f"{_where(node)}: {target} draws random numbers")
            node = self._functional(node)
            if node is None:
                return
            target = node.target
        elif not (callable(target) and target.__module__ in ("_operator", "operator", "math")):
            raise NotCaptured(f"{_where(node)}: {target}")
        if target in _SAME or _is_switched_off(node) or (target in _SAME_IF_ALIKE and self._alike(node)):
            self.values[node] = value(node.args[0])
            if not _is_switched_off(node) and not _one_memory(node, node.args[0]):
                self.shared |= {node, node.args[0]}  # a copy: a write to either would have to tell them apart
            return
        if _is_aten(target) and target._schema.name.partition("::")[2] in _ABOUT_MEMORY:
            raise NotCaptured(f"{_where(node)}: {target} looks at how memory is laid out")
        if target is aten.sym_size.int and self._is_led(value(node.args[0])) and node.args[1] == 0:
            self.nodes.append(Node("rows", [], None, _where(node), dtype=None))
            self.values[node] = Ref(len(self.nodes) - 1)
            return
        planned = getattr(self, f"_plan_{target._schema.name.partition('::')[2]}", None) if _is_aten(target) else None
        made = planned(node) if planned else None
        self.values[node] = Ref(self._add(node, *made)) if made else Ref(self._generic(node))
        if made and made[0] == "flatten":
            self.nodes[-1].call = None  # it may name the number of images, which nothing needs
        if made and target is aten.masked_fill.Scalar:
            options = self.nodes[-1].options
            self.nodes[-1].call = (clamp, (made[1][0], options["low"], options["high"]), {})

    def _functional(self, node: fx.Node) -> fx.Node | None:
        """An operation that writes to its first operand as one that does not; later readers get the result."""
        schema = node.target._schema
        written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if not written:
            passed = node.target in _SAME or node.target in _SAME_IF_ALIKE or _is_switched_off(node)
            if any(r.alias_info is not None for r in schema.returns) and not passed:
                self.shared |= {node, *node.all_input_nodes}  # a view
            return node
        subject = node.args[0]
        value = self._value(subject)
        name = schema.name.partition("::")[2]
        plain = getattr(getattr(aten, name.removesuffix("_"), None), node.target._overloadname, None)
        if written != [0] or not name.endswith("_") or plain is None:
            raise NotCaptured(f"{_where(node)}: {node.target} writes to its operands")
        if not isinstance(value, Ref) or value.index == 0:
            changed = value.name if isinstance(value, Param) else "the images"
            raise NotCaptured(f"{_where(node)}: {node.target} changes {changed}")
        if subject in self.shared:
            raise NotCaptured(f"{_where(node)}: {node.target} writes to memory that another value shares")
        with node.graph.inserting_before(node):
            made = node.graph.call_function(plain, node.args, node.kwargs)
        made.meta = node.meta
        self._call(made)
        for name in (node, *[name for name, known in self.values.items() if known == value]):
            self.values[name] = self.values[made]
        return None

    def _value(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def _alike(self, node: fx.Node) -> bool:
        before, after = node.args[0].meta["val"], node.meta["val"]
        return before.dtype == after.dtype and before.device == after.device

    def _add(self, node: fx.Node, op: str, inputs: list[Ref], options: dict) -> int:
        return self._append(node, op, [ref.index for ref in inputs], options, each_row=True)

    def _append(self, node: fx.Node, op: str, inputs: list[int], options: dict, each_row: bool) -> int:
        arguments = fx.node.map_arg((node.args, node.kwargs), self._value)
        # Memory may be laid out otherwise than it was in the export.
        target = aten.reshape.default if node.target is aten.view.default else node.target
        call = (target, *arguments)
        dtype = getattr(node.meta.get("val"), "dtype", None)
        self.nodes.append(Node(op, inputs, _shape(node), _where(node), each_row, options, call, dtype))
        return len(self.nodes) - 1

    def _generic(self, node: fx.Node) -> int:
        """Any operation, with its arguments as they are."""
        operands = [self._value(n) for n in node.all_input_nodes]
        refs = [v.index for v in operands if isinstance(v, Ref)]
        name = node.target._schema.name.partition("::")[2] if _is_aten(node.target) else ""
        shapes = [self.nodes[index].shape for index in refs if self.nodes[index].op != "rows"]
        led = bool(shapes) and None not in shapes and _shape(node) is not None
        each_row = led and (
            (name in _EACH_ROW and len({len(shape) for shape in shapes}) == 1) or self._keeps_rows(node, name, shapes)
        )
        return self._append(node, "call", refs, {}, each_row)

    def _keeps_rows(self, node: fx.Node, name: str, shapes: list[tuple[int, ...]]) -> bool:
        """Operations that do so for some arguments."""
        rank = len(shapes[0]) + 1
        arguments = _arguments(node, self._value)
        if name in ("view", "reshape"):  # the batch stays in front, and what it leads stays together
            first = arguments[1][0]
            rows = isinstance(first, Ref) and self.nodes[first.index].op == "rows"
            return (rows or first == -1) and prod(shapes[0]) == prod(_shape(node))
        if name == "batch_norm":
            return not arguments[5]
        if name in ("pad", "constant_pad_nd"):
            return len(arguments[1]) < 2 * rank
        if name == "permute":
            return arguments[1][0] == 0
        if name == "scaled_dot_product_attention":
            return len(shapes) == 3 and len(shapes[0]) == 3
        if name in ("mean", "sum", "amax", "amin"):
            dims = [arguments[1]] if isinstance(arguments[1], int) else arguments[1]
            return bool(dims) and all(d % rank for d in dims)
        dims = {
            "cat": [1], "flatten": [1], "softmax": [1], "log_softmax": [1], "transpose": [1, 2], "slice": [1],
            "select": [1], "squeeze": [1], "unflatten": [1],
        }  # fmt: skip
        if name == "unsqueeze":
            return arguments[1] % (rank + 1) != 0
        return name in dims and all(isinstance(arguments[i], int) and arguments[i] % rank for i in dims[name])

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

        kept = [self.nodes[old] for old in sorted(needed)]
        for node in kept:
            node.inputs = [places[index] for index in node.inputs]
            if node.call is not None:
                node.call = (node.call[0], *map_values(moved, node.call[1:]))
        self.nodes[:] = kept

    # What can be planned; each gives (op, inputs, options), or None where its arguments are out of the ordinary.

    def _plan_conv2d(self, node: fx.Node):
        x, weight, bias, stride, padding, dilation, groups = _arguments(node, self._value)
        if not self._is_image(x) or not isinstance(weight, Param) or isinstance(padding, str):
            return None
        if bias is not None and not isinstance(bias, Param):
            return None
        sizes = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
        return "conv", [x], {"weight": weight, "bias": bias, "kernel": _size(node.args[1])[2:], **sizes}

    def _plan_linear(self, node: fx.Node):
        x, weight, bias = _arguments(node, self._value)
        if not isinstance(x, Ref) or not isinstance(weight, Param) or not (bias is None or isinstance(bias, Param)):
            return None
        shape = self.nodes[x.index].shape
        return ("linear", [x], {"weight": weight, "bias": bias}) if shape and len(shape) == 1 else None

    def _plan_batch_norm(self, node: fx.Node):
        x, weight, bias, mean, var, training, _, eps, _ = _arguments(node, self._value)
        if training or not self._is_image(x) or not all(v is None or isinstance(v, Param) for v in (weight, bias)):
            return None
        if not isinstance(mean, Param) or not isinstance(var, Param):
            return None
        return "batch_norm", [x], {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps}

    def _twin_bn(self, node: fx.Node) -> tuple:
        """All rows on one wing, with residual sum and ReLU (ops.py)."""
        x, residual, split, mean, var, weight, bias, *_, eps, relu, _, _ = _arguments(node, self._value)
        rows = isinstance(split, Ref) and self.nodes[split.index].op == "rows"
        vectors = (mean, var, weight, bias)
        if not rows or not self._is_image(x) or not all(v is None or isinstance(v, Param) for v in vectors):
            raise NotCaptured(f"{_where(node)}: two wings at once")
        options = {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps}
        shape, where = self.nodes[x.index].shape, _where(node)

        def add(op: str, inputs: list[int], options: dict) -> Ref:
            self.nodes.append(Node(op, inputs, shape, where, True, options))
            return Ref(len(self.nodes) - 1)

        result = add("batch_norm", [x.index], options)
        if residual is not None:
            result = add("add", [result.index, residual.index], {})
        if relu:
            result = add("relu", [result.index], {})
        return result, None, None

    def _plan_relu(self, node: fx.Node):
        x = self._value(node.args[0])
        return ("relu", [x], {}) if self._is_led(x) else None

    def _plan_hardtanh(self, node: fx.Node):
        x, low, high = _arguments(node, self._value)
        return ("clamp", [x], {"low": float(low), "high": float(high), "at_bounds": 0}) if self._is_led(x) else None

    def _plan_clamp(self, node: fx.Node):
        x, low, high = _arguments(node, self._value)
        if not self._is_led(x) or not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
            return None
        low, high = (float(d if b is None else b) for b, d in ((low, "-inf"), (high, "inf")))
        return "clamp", [x], {"low": low, "high": high, "at_bounds": int(torch_passes_at_bounds())}

    _plan_clip = _plan_clamp

    def _plan_masked_fill(self, node: fx.Node):
        """One side of :func:`twins_fast.models.clamp.clamp`."""
        x, _, bound = _arguments(node, self._value)
        compared = node.args[1]
        side = {aten.lt.Scalar: "low", aten.gt.Scalar: "high"}.get(compared.target)
        if side is None or compared.args != (node.args[0], bound) or not self._is_led(x):
            return None
        return "clamp", [x], {"low": -inf, "high": inf, side: float(bound), "at_bounds": 1}

    def _plan_add(self, node: fx.Node):
        return self._arithmetic(node)

    _plan_sub = _plan_mul = _plan_div = _plan_add

    def _arithmetic(self, node: fx.Node):
        """A sum of two alike values, or arithmetic with a parameter or number that is the same for every row."""
        kind = _ARITHMETIC.get(node.target)
        if kind is None or any(node.kwargs.values()) or len(node.args) != 2:
            return None
        x, other = (self._value(a) for a in node.args)
        if isinstance(x, Ref) and isinstance(other, Ref):
            alike = self._is_led(x) and self.nodes[x.index].shape == self.nodes[other.index].shape
            return ("add", [x, other], {}) if kind == "add" and alike else None
        if not isinstance(x, Ref):
            if kind not in ("add", "mul"):
                return None
            x, other = other, x
        if not self._is_image(x):
            return None
        if isinstance(other, Param):
            per_channel = tensor_of(self.model, other.name)
            channels = self.nodes[x.index].shape[0]
            if per_channel.numel() not in (1, channels) or list(per_channel.shape[-3:]) not in (
                [per_channel.numel(), 1, 1], [], [1],
            ):  # fmt: skip
                return None
        elif not isinstance(other, (int, float)):
            return None
        return "arithmetic", [x], {"kind": kind, "other": other}

    def _plan_max_pool2d(self, node: fx.Node):
        x, kernel, stride, padding, dilation, ceil = _arguments(node, self._value)
        kernel = _pair(kernel)
        if not self._is_image(x) or _pair(dilation) != (1, 1) or ceil or kernel[0] * kernel[1] > 255:
            return None
        return "max_pool", [x], {"kernel": kernel, "stride": _pair(stride or kernel), "padding": _pair(padding)}

    def _plan_avg_pool2d(self, node: fx.Node):
        x, kernel, stride, padding, ceil, _, divisor = _arguments(node, self._value)
        if not self._is_image(x) or _pair(padding) != (0, 0) or ceil or divisor is not None:
            return None
        return "avg_pool", [x], {"kernel": _pair(kernel), "stride": _pair(stride or kernel)}

    def _plan_adaptive_avg_pool2d(self, node: fx.Node):
        x = self._value(node.args[0])
        if not self._is_image(x) or _shape(node)[1:] != (1, 1):
            return None
        size = self.nodes[x.index].shape[1:]
        return "avg_pool", [x], {"kernel": size, "stride": size}

    def _plan_mean(self, node: fx.Node):
        x = self._value(node.args[0])
        dims = node.args[1] if len(node.args) > 1 and not node.kwargs else None
        if not self._is_image(x) or dims is None or sorted(d % 4 for d in dims) != [2, 3]:
            return None
        size = self.nodes[x.index].shape[1:]
        return "avg_pool", [x], {"kernel": size, "stride": size}

    def _plan_flatten(self, node: fx.Node):
        x, start, end = _arguments(node, self._value)
        if not self._is_image(x) or start != 1 or end not in (-1, 3) or self.nodes[x.index].shape[1:] != (1, 1):
            return None
        return "flatten", [x], {}

    def _plan_view(self, node: fx.Node):
        x = self._value(node.args[0])
        if not self._is_image(x) or self.nodes[x.index].shape != (*(_shape(node) or ()), 1, 1):
            return None
        return "flatten", [x], {}

    _plan_reshape = _plan_view

    def _plan_upsample_nearest2d(self, node: fx.Node):
        x, *sizes = _arguments(node, self._value)
        if not self._is_image(x):
            return None
        before, after = self.nodes[x.index].shape[1:], _shape(node)[1:]
        scales = sizes[1] if node.target is aten.upsample_nearest2d.vec else sizes[1:]
        scales = [scale for scale in scales or () if scale is not None]
        # With a scale, PyTorch looks up pixels by it and not by the sizes' ratio.
        if any(old * scale != new for old, scale, new in zip(before, scales, after, strict=False)):
            return None
        return "upsample", [x], {}

    def _is_led(self, x: Any) -> bool:
        return isinstance(x, Ref) and self.nodes[x.index].shape is not None

    def _is_image(self, x: Any) -> bool:
        return self._is_led(x) and len(self.nodes[x.index].shape) == 3


def _one_memory(node: fx.Node, source: fx.Node) -> bool:
    """Whether one is the other, as the export saw it."""
    values = [n.meta["val"].untyped_storage()._cdata for n in (node, source)]
    return values[0] == values[1]


def _is_aten(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _is_switched_off(node: fx.Node) -> bool:
    """Dropout that drops nothing."""
    dropouts = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
    return node.target in dropouts and (node.args[2] is False or node.args[1] == 0)


def _draws_nothing(node: fx.Node) -> bool:
    attention = node.target is aten.scaled_dot_product_attention.default
    return _is_switched_off(node) or (attention and not _arguments(node, lambda v: v)[4])


def _arguments(node: fx.Node, value) -> list[Any]:
    """All arguments of the operation in the order of its schema, with defaults."""
    given = list(node.args)
    for argument in node.target._schema.arguments[len(given) :]:
        given.append(node.kwargs.get(argument.name, argument.default_value))
    return [fx.node.map_arg(argument, value) for argument in given]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found = node.meta.get("val")
    if not isinstance(found, Tensor) or found.dim() == 0 or isinstance(found.shape[0], int):
        return None
    rest = found.shape[1:]
    return tuple(rest) if all(isinstance(size, int) for size in rest) and _is_symbol(found.shape[0]) else None


def _is_symbol(size: torch.SymInt) -> bool:
    """The batch itself, not a multiple of it."""
    return size.node.expr.is_symbol


def _size(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _pair(value) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both if len(both) == 2 else both * 2


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
    path = "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self']").removeprefix(".")
    return path or "the model"


def map_values(function, value):
    """``value`` with ``function`` applied to every Ref and Param in it."""
    if isinstance(value, (Ref, Param)):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_values(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_values(function, item) for key, item in value.items()}
    return value


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), last)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes of all modules."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers, module.__dict__):
            yield from ((dot + name, t) for name, t in store.items() if isinstance(t, Tensor))
