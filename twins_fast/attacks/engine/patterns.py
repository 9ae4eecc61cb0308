"""The operations that are planned: one small function each, by the name of the ATen operation.

A pattern gives what the operation becomes, or None if its arguments are not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from twins_fast.attacks.engine.activations import Activation
from twins_fast.attacks.engine.executors.pixels import sources_of
from twins_fast.attacks.engine.graph import Reading, arguments, aten, module_of, pair, shape_of, size_of
from twins_fast.attacks.engine.layout import FIRST, LAST
from twins_fast.attacks.engine.nodes import Call, Derived, Node, NotCaptured, Param, Ref
from twins_fast.attacks.engine.windows import Windows, adaptive, copied, moved, pooled
from twins_fast.models.clamp import clamp as clamp_passing_at_bounds
from twins_fast.models.clamp import torch_passes_at_bounds


class Match(NamedTuple):
    """The node that an operation becomes.

    Attributes:
        op, options: of the node.
        inputs: the results that it reads.
        call: computes it where it is not planned after all; None for the operation itself.
    """

    op: str
    inputs: list[Ref]
    options: dict[str, Any]
    call: Call | None = None


Pattern = Callable[[Reading, fx.Node], Match | None]
PATTERNS: dict[str, Pattern] = {}

_ARITHMETIC = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div"}


def pattern(*names: str):
    """Enter a function into the table under the names of its ATen operations, without overloads."""

    def enter(function: Pattern) -> Pattern:
        PATTERNS.update(dict.fromkeys(names, function))
        return function

    return enter


def _is_source(value: Any) -> bool:
    return isinstance(value, (Param, Derived))


@pattern("conv2d")
def conv2d(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias, stride, padding, dilation, groups = arguments(node, reading.value)
    if not reading.is_image(x) or not _is_source(weight):
        return None
    if bias is not None and not _is_source(bias):
        return None
    kernel = size_of(node.args[1])[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":  # what is odd is at the end
        padding = [d * (k - 1) // 2 for d, k in zip(pair(dilation), kernel, strict=True)]
    sizes = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation), "groups": groups}
    return Match("conv", [x], {"weight": weight, "bias": bias, "kernel": kernel, **sizes})


@pattern("linear")
def linear(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias = arguments(node, reading.value)
    if not isinstance(x, Ref) or not _is_source(weight) or not (bias is None or _is_source(bias)):
        return None
    return Match("linear", [x], {"weight": weight, "bias": bias}) if reading.nodes[x.index].shape else None


@pattern("layer_norm")
def layer_norm(reading: Reading, node: fx.Node) -> Match | None:
    """Over the channels alone."""
    x, sizes, weight, bias, eps, _ = arguments(node, reading.value)
    if not reading.is_batched(x) or len(sizes) != 1 or reading.nodes[x.index].dtype != torch.float32:
        return None
    if not all(v is None or _is_source(v) for v in (weight, bias)):
        return None
    return Match("layer_norm", [x], {"weight": weight, "bias": bias, "eps": eps})


@pattern("batch_norm")
def batch_norm(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias, mean, var, training, _, eps, _ = arguments(node, reading.value)
    if training or not _is_feature(reading, x) or not all(v is None or _is_source(v) for v in (weight, bias)):
        return None
    if not _is_source(mean) or not _is_source(var):
        return None
    return Match("batch_norm", [x], {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps})


def twin_batch_norm(reading: Reading, node: fx.Node) -> tuple[Ref, None, None]:
    """Two-wing batch norm with all rows on one wing, then residual sum and ReLU: a node for each."""
    x, residual, split, mean, var, weight, bias, *_, eps, relu, _, _ = arguments(node, reading.value)
    rows = isinstance(split, Ref) and reading.nodes[split.index].op == "rows"
    vectors = (mean, var, weight, bias)
    if not rows or not reading.is_image(x) or not all(v is None or _is_source(v) for v in vectors):
        raise NotCaptured(f"{module_of(node)}: two wings at once")
    options = {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps}
    shape, where = reading.nodes[x.index].shape, module_of(node)

    def append(op: str, inputs: list[Ref], options: dict, call: Call | None) -> Ref:
        reading.nodes.append(Node(op, [ref.index for ref in inputs], shape, where, True, options, call))
        return Ref(len(reading.nodes) - 1)

    result = append("batch_norm", [x], options, None)
    if residual is not None:
        result = append("add", [result, residual], {}, (aten.add.Tensor, (result, residual), {}))
    if relu:
        result = append("relu", [result], {}, (aten.relu.default, (result,), {}))
    return result, None, None


@pattern("relu")
def relu(reading: Reading, node: fx.Node) -> Match | None:
    x = reading.value(node.args[0])
    return Match("relu", [x], {}) if reading.is_batched(x) else None


@pattern("silu", "sigmoid", "tanh", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish")
def activation(reading: Reading, node: fx.Node) -> Match | None:
    x, *rest = arguments(node, reading.value)
    name = node.target._schema.name.partition("::")[2]
    if not reading.is_batched(x) or reading.nodes[x.index].dtype != torch.float32:
        return None
    if name == "gelu":
        found = Activation("gelu" if rest[0] == "none" else "gelu tanh")
    elif name == "leaky_relu":
        found = Activation("leaky relu", float(rest[0]))
    elif name == "elu":
        if rest[1:] != [1, 1]:
            return None
        found = Activation("elu", float(rest[0]))
    else:
        found = Activation(name)
    return Match("activation", [x], {"activation": found})


@pattern("hardtanh", "relu6")
def hardtanh(reading: Reading, node: fx.Node) -> Match | None:
    x, *bounds = arguments(node, reading.value)
    low, high = bounds or (0, 6)
    options = {"low": float(low), "high": float(high), "at_bounds": 0}
    return Match("clamp", [x], options) if reading.is_batched(x) else None


@pattern("clamp", "clip")
def clamp(reading: Reading, node: fx.Node) -> Match | None:
    x, low, high = arguments(node, reading.value)
    if not reading.is_batched(x) or not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return None
    low, high = (float(d if b is None else b) for b, d in ((low, "-inf"), (high, "inf")))
    return Match("clamp", [x], {"low": low, "high": high, "at_bounds": int(torch_passes_at_bounds())})


@pattern("masked_fill")
def masked_fill(reading: Reading, node: fx.Node) -> Match | None:
    """One side of :func:`twins_fast.models.clamp.clamp`."""
    x, _, bound = arguments(node, reading.value)
    compared = node.args[1]
    side = {aten.lt.Scalar: "low", aten.gt.Scalar: "high"}.get(compared.target)
    if side is None or compared.args != (node.args[0], bound) or not reading.is_batched(x):
        return None
    options = {"low": -inf, "high": inf, side: float(bound), "at_bounds": 1}
    return Match("clamp", [x], options, (clamp_passing_at_bounds, (x, options["low"], options["high"]), {}))


@pattern("add", "sub", "mul", "div")
def arithmetic(reading: Reading, node: fx.Node) -> Match | None:
    """A sum of two alike values, or arithmetic with a number or parameter for each channel."""
    kind = _ARITHMETIC.get(node.target)
    if kind is None or any(node.kwargs.values()) or len(node.args) != 2:
        return None
    x, other = (reading.value(a) for a in node.args)
    if isinstance(x, Ref) and isinstance(other, Ref) and kind == "mul":
        for one, gate in ((x, other), (other, x)):  # x * sigmoid(x)
            made = reading.nodes[gate.index]
            if made.op == "activation" and made.options["activation"].kind == "sigmoid" and made.inputs == [one.index]:
                return Match("activation", [one], {"activation": Activation("silu")}, (aten.silu.default, (one,), {}))
    if isinstance(x, Ref) and isinstance(other, Ref):
        alike = reading.is_batched(x) and reading.nodes[x.index].shape == reading.nodes[other.index].shape
        if kind == "mul":
            return _product(reading, x, other)
        if kind == "sub" and alike and _is_feature(reading, x) and _is_feature(reading, other):
            made = reading.nodes[other.index]
            negated = {"kind": "mul", "other": -1.0}
            call = (aten.mul.Tensor, (other, -1.0), {})
            reading.nodes.append(Node("arithmetic", [other.index], made.shape, made.where, True, negated, call))
            negative = Ref(len(reading.nodes) - 1)
            return Match("add", [x, negative], {}, (aten.add.Tensor, (x, negative), {}))
        return Match("add", [x, other], {}) if kind == "add" and alike else None
    operand = node.args[1]
    if not isinstance(x, Ref):
        if kind not in ("add", "mul", "sub"):
            return None
        kind = "rsub" if kind == "sub" else kind
        x, other, operand = other, x, node.args[0]
    if not reading.is_batched(x):
        return None
    of, channels = reading.nodes[x.index].shape, None
    if _is_source(other) or isinstance(other, Tensor):
        tensor = operand.meta["val"]
        if tensor.dim() and tensor.dtype != torch.float32:
            return None  # the result is of another type
        alike = (1,) * (len(of) + 1 - tensor.dim()) + tuple(tensor.shape)
        if tensor.numel() != 1 or len(alike) > len(of) + 1:
            ones = (1,) * len(of[1:])
            each = {FIRST: (1, *of[:1], *ones), LAST: (1, *ones, *of[-1:])}
            channels = [(place, place) for place in each if each[place] == alike]
            if not channels:
                return None
    elif not isinstance(other, (int, float)):
        return None
    return Match("arithmetic", [x], {"kind": kind, "other": other, "channels": channels})


def _is_feature(reading: Reading, x: Any) -> bool:
    """An image, or a vector for each of them, in float32."""
    return (
        reading.is_batched(x)
        and len(reading.nodes[x.index].shape) in (1, 3)
        and reading.nodes[x.index].dtype == torch.float32
    )


def _product(reading: Reading, x: Ref, gate: Ref) -> Match | None:
    """Of two alike values, or of an image and one number per channel or per pixel."""
    if not (_is_feature(reading, x) and _is_feature(reading, gate)):
        return None
    if prod(reading.nodes[x.index].shape) < prod(reading.nodes[gate.index].shape):
        x, gate = gate, x
    made = reading.nodes[gate.index]
    if made.op == "call" and made.call[0] in (aten.expand_as.default, aten.expand.default):
        gate = made.call[1][0]
        if not (isinstance(gate, Ref) and _is_feature(reading, gate)):
            return None
    shape, of_gate = (reading.nodes[ref.index].shape for ref in (x, gate))
    fits = of_gate in (shape, (*shape[:1], *[1] * (len(shape) - 1)), (1, *shape[1:]))
    if not fits or len(shape) != len(of_gate):
        return None
    channels = [(FIRST, FIRST), (LAST, LAST)] if shape == of_gate else None
    return Match("product", [x, gate], {"channels": channels}, (aten.mul.Tensor, (x, gate), {}))


@pattern("rsub")
def rsub(reading: Reading, node: fx.Node) -> Match | None:
    x, other, alpha = arguments(node, reading.value)
    if not _is_feature(reading, x) or not isinstance(other, (int, float)) or alpha != 1:
        return None
    return Match("arithmetic", [x], {"kind": "rsub", "other": other})


@pattern("cat")
def cat(reading: Reading, node: fx.Node) -> Match | None:
    parts, dim, *_ = (*(reading.value(a) for a in node.args), 0)
    refs = [reading.value(part) for part in parts]
    if not all(_is_feature(reading, ref) for ref in refs) or dim % len(size_of(node)) != 1:
        return None
    return Match("concat", refs, {})


@pattern("slice")
def slice_(reading: Reading, node: fx.Node) -> Match | None:
    x, dim, start, end, step = arguments(node, reading.value)
    dim %= len(size_of(node))
    after = shape_of(node)
    if not _is_feature(reading, x) or dim == 0 or 0 in after:
        return None
    before = reading.nodes[x.index].shape
    first = range(*slice(start, end).indices(before[dim - 1])).start
    if dim == 1:
        return Match("slice", [x], {"first": first, "step": step})
    axes = [moved(size, size, 0) for size in before[1:]]
    axes[dim - 2] = moved(before[dim - 1], after[dim - 1], first, step)
    return _pooled(x, *axes, op="crop")


@pattern("constant_pad_nd", "pad")
def pad(reading: Reading, node: fx.Node) -> Match | None:
    x, sizes, *rest = arguments(node, reading.value)
    if not reading.is_image(x) or len(sizes) not in (2, 4) or not all(type(n) is int for n in sizes):
        return None
    if rest not in ([0], ["constant", None], ["constant", 0]):
        return None
    left, _, top, _ = (*sizes, 0, 0)[:4]
    sizes = zip(reading.nodes[x.index].shape[1:], shape_of(node)[1:], (-top, -left), strict=True)
    rows, columns = (moved(*numbers) for numbers in sizes)
    return Match("pad", [x], {"padding": (top, left), "rows": rows, "columns": columns})


@pattern("max_pool2d")
def max_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x, kernel, stride, padding, dilation, ceil = arguments(node, reading.value)
    kernel = pair(kernel)
    if not reading.is_image(x) or pair(dilation) != (1, 1) or kernel[0] * kernel[1] > 255:
        return None
    sizes = {"kernel": kernel, "stride": pair(stride or kernel), "padding": pair(padding), "ceil": ceil}
    return Match("max_pool", [x], sizes)


@pattern("avg_pool2d")
def avg_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x, kernel, stride, padding, _, counts_padding, divisor = arguments(node, reading.value)
    if not reading.is_image(x):
        return None
    results, size = shape_of(node)[1:], reading.nodes[x.index].shape[1:]
    sizes = zip(size, results, pair(kernel), pair(stride or kernel), pair(padding), strict=True)
    rows, columns = (pooled(*numbers, counts_padding) for numbers in sizes)
    if divisor is not None:
        rows = rows._replace(weight=(1 / divisor,) * results[0])
        columns = columns._replace(weight=(1.0,) * results[1])
    return _pooled(x, rows, columns)


def _pooled(x: Ref, rows: Windows, columns: Windows, op: str = "avg_pool") -> Match:
    return Match(op, [x], {"rows": rows, "columns": columns})


@pattern("adaptive_avg_pool2d")
def adaptive_avg_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x = reading.value(node.args[0])
    if not reading.is_image(x):
        return None
    sizes = zip(reading.nodes[x.index].shape[1:], shape_of(node)[1:], strict=True)
    return _pooled(x, *(adaptive(*numbers) for numbers in sizes))


@pattern("mean")
def mean(reading: Reading, node: fx.Node) -> Match | None:
    """Over all pixels."""
    x = reading.value(node.args[0])
    dims = node.args[1] if len(node.args) > 1 and not node.kwargs else None
    if not reading.is_batched(x) or not dims:
        return None
    of = reading.nodes[x.index].shape
    dims = sorted(d % (len(of) + 1) for d in dims)
    if len(dims) != len(of) - 1 or dims != list(range(dims[0], dims[0] + len(dims))):
        return None
    sizes = [of[d - 1] for d in dims]
    rows, columns = (adaptive(n, 1) for n in (sizes if len(sizes) == 2 else (prod(sizes), 1)))
    channels = [(LAST, LAST)] if dims[0] == 1 else [(FIRST, FIRST)]
    return Match("avg_pool", [x], {"rows": rows, "columns": columns, "channels": channels})


@pattern("flatten", "view", "reshape", "permute", "transpose")
def same(reading: Reading, node: fx.Node) -> Match | None:
    """The pixels in another arrangement, or the channels moved from the first place to the last or back."""
    x, to = reading.value(node.args[0]), shape_of(node)
    groups = _shuffled_groups(reading, node.args[0], to)
    if groups:
        return Match("shuffle", [groups[0]], {"groups": groups[1]}, (shuffle, groups, {}))
    if not reading.is_batched(x) or not to:
        return None
    of, call = reading.nodes[x.index].shape, None
    if node.target in (aten.permute.default, aten.transpose.int):
        plain = list(range(len(of) + 1))
        moves = {(FIRST, LAST): [0, *plain[2:], 1], (LAST, FIRST): [0, len(of), *plain[1:-1]]}
        channels = [pair for pair, order in moves.items() if order == _order(node, plain)]
    elif prod(of) == prod(to):
        channels = [(kept, kept) for kept, place in ((FIRST, 0), (LAST, -1)) if of and of[place] == to[place]]
        call = (aten.reshape.default, (x, [-1, *to]), {})  # names no number of images, which nothing needs
        if not channels and reading.is_image(x) and len(to) == 1:
            return Match("flatten", [x], {}, call)
    else:
        return None
    return Match("same", [x], {"channels": channels}, call) if channels else None


def _order(node: fx.Node, dimensions: list[int]) -> list[int]:
    """How a permutation or an exchange orders them."""
    if node.target is aten.permute.default:
        return [dimensions[d] for d in node.args[1]]
    a, b = (dimensions[d] for d in node.args[1:])
    return [b if d == a else a if d == b else d for d in dimensions]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """The channels of each group in turn."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _shuffled_groups(reading: Reading, source: fx.Node, after: tuple[int, ...] | None) -> tuple[Ref, int] | None:
    """What is shuffled by a view of ``source``, and in how many groups, if that exchanges groups and their channels."""
    while source.target in (aten.contiguous.default, aten.clone.default):
        source = source.args[0]
    if source.target is not aten.transpose.int or {d % 5 for d in source.args[1:]} != {1, 2}:
        return None
    grouped = source.args[0]
    if grouped.target not in (aten.view.default, aten.reshape.default):
        return None
    x, shape = reading.value(grouped.args[0]), shape_of(grouped)
    if not _is_feature(reading, x) or shape is None or reading.nodes[x.index].shape != after:
        return None
    return (x, shape[0]) if shape[2:] == after[1:] and shape[0] * shape[1] == after[0] else None


@pattern("upsample_nearest2d")
def upsample_nearest2d(reading: Reading, node: fx.Node) -> Match | None:
    x, *sizes = arguments(node, reading.value)
    if not reading.is_image(x):
        return None
    before, after = reading.nodes[x.index].shape[1:], shape_of(node)[1:]
    scales = sizes[1] if node.target is aten.upsample_nearest2d.vec else sizes[1:]
    scales = [scale for scale in scales or () if scale is not None]
    # With a scale, PyTorch looks up pixels by it and not by the sizes' ratio.
    if any(old * scale != new for old, scale, new in zip(before, scales, after, strict=False)):
        return None
    sizes = zip(before, after, strict=True)
    return _pooled(x, *(copied(small, sources_of(small, big)) for small, big in sizes), op="upsample")


def several(reading: Reading, node: fx.Node) -> tuple[Ref | None, ...] | None:
    """The results of an operation that gives more than one; None if it is not planned."""
    name = node.target._schema.name.partition("::")[2]
    if name in ("chunk", "split", "split_with_sizes"):
        return _split(reading, node)
    return _largest(reading, node) if name == "adaptive_max_pool2d" else None


def _split(reading: Reading, node: fx.Node) -> tuple[Ref, ...] | None:
    """Slices of one value."""
    x, _, *dim = (reading.value(a) for a in node.args)
    if not _is_feature(reading, x) or not dim or dim[0] % (len(reading.nodes[x.index].shape) + 1) != 1:
        return None
    parts, first = [], 0
    for size in (part.shape[1] for part in node.meta["val"]):
        call = (aten.slice.Tensor, (x, 1, first, first + size), {})
        shape = (size, *reading.nodes[x.index].shape[1:])
        options = {"first": first, "step": 1}
        reading.nodes.append(Node("slice", [x.index], shape, module_of(node), True, options, call))
        parts.append(Ref(len(reading.nodes) - 1))
        first += size
    return tuple(parts)


def _largest(reading: Reading, node: fx.Node) -> tuple[Ref, None] | None:
    """The maximum of a whole image; nobody asks where it is."""
    x, results = (reading.value(a) for a in node.args)
    if not reading.is_image(x) or pair(results) != (1, 1) or prod(reading.nodes[x.index].shape[1:]) > 255:
        return None
    channels, *size = reading.nodes[x.index].shape
    options = {"kernel": tuple(size), "stride": tuple(size), "padding": (0, 0), "ceil": False}
    call = (torch.amax, (x, (2, 3), True), {})
    reading.nodes.append(Node("max_pool", [x.index], (channels, 1, 1), module_of(node), True, options, call))
    return Ref(len(reading.nodes) - 1), None
