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
from twins_fast.attacks.engine.graph import Reading, arguments, aten, module_of, pair, shape_of, size_of
from twins_fast.attacks.engine.layout import FIRST, LAST
from twins_fast.attacks.engine.nodes import Call, Node, NotCaptured, Param, Ref, tensor_of
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


@pattern("conv2d")
def conv2d(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias, stride, padding, dilation, groups = arguments(node, reading.value)
    if not reading.is_image(x) or not isinstance(weight, Param) or isinstance(padding, str):
        return None
    if bias is not None and not isinstance(bias, Param):
        return None
    sizes = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation), "groups": groups}
    return Match("conv", [x], {"weight": weight, "bias": bias, "kernel": size_of(node.args[1])[2:], **sizes})


@pattern("linear")
def linear(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias = arguments(node, reading.value)
    if not isinstance(x, Ref) or not isinstance(weight, Param) or not (bias is None or isinstance(bias, Param)):
        return None
    return Match("linear", [x], {"weight": weight, "bias": bias}) if reading.nodes[x.index].shape else None


@pattern("layer_norm")
def layer_norm(reading: Reading, node: fx.Node) -> Match | None:
    """Over the channels alone."""
    x, sizes, weight, bias, eps, _ = arguments(node, reading.value)
    if not reading.is_batched(x) or len(sizes) != 1 or reading.nodes[x.index].dtype != torch.float32:
        return None
    if not all(v is None or isinstance(v, Param) for v in (weight, bias)):
        return None
    return Match("layer_norm", [x], {"weight": weight, "bias": bias, "eps": eps})


@pattern("batch_norm")
def batch_norm(reading: Reading, node: fx.Node) -> Match | None:
    x, weight, bias, mean, var, training, _, eps, _ = arguments(node, reading.value)
    if training or not reading.is_image(x) or not all(v is None or isinstance(v, Param) for v in (weight, bias)):
        return None
    if not isinstance(mean, Param) or not isinstance(var, Param):
        return None
    return Match("batch_norm", [x], {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps})


def twin_batch_norm(reading: Reading, node: fx.Node) -> tuple[Ref, None, None]:
    """Two-wing batch norm with all rows on one wing, then residual sum and ReLU: a node for each."""
    x, residual, split, mean, var, weight, bias, *_, eps, relu, _, _ = arguments(node, reading.value)
    rows = isinstance(split, Ref) and reading.nodes[split.index].op == "rows"
    vectors = (mean, var, weight, bias)
    if not rows or not reading.is_image(x) or not all(v is None or isinstance(v, Param) for v in vectors):
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
        return Match("add", [x, other], {}) if kind == "add" and alike else None
    if not isinstance(x, Ref):
        if kind not in ("add", "mul"):
            return None
        x, other = other, x
    if not reading.is_batched(x):
        return None
    of, channels = reading.nodes[x.index].shape, None
    if isinstance(other, (Param, Tensor)):
        tensor = other if isinstance(other, Tensor) else tensor_of(reading.model, other.name)
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


@pattern("max_pool2d")
def max_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x, kernel, stride, padding, dilation, ceil = arguments(node, reading.value)
    kernel = pair(kernel)
    if not reading.is_image(x) or pair(dilation) != (1, 1) or ceil or kernel[0] * kernel[1] > 255:
        return None
    return Match("max_pool", [x], {"kernel": kernel, "stride": pair(stride or kernel), "padding": pair(padding)})


@pattern("avg_pool2d")
def avg_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x, kernel, stride, padding, ceil, _, divisor = arguments(node, reading.value)
    if not reading.is_image(x) or pair(padding) != (0, 0) or ceil or divisor is not None:
        return None
    return Match("avg_pool", [x], {"kernel": pair(kernel), "stride": pair(stride or kernel)})


@pattern("adaptive_avg_pool2d")
def adaptive_avg_pool2d(reading: Reading, node: fx.Node) -> Match | None:
    x = reading.value(node.args[0])
    if not reading.is_image(x) or shape_of(node)[1:] != (1, 1):
        return None
    size = reading.nodes[x.index].shape[1:]
    return Match("avg_pool", [x], {"kernel": size, "stride": size})


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
    size = tuple(sizes) if len(sizes) == 2 else (prod(sizes), 1)
    channels = [(LAST, LAST)] if dims[0] == 1 else [(FIRST, FIRST)]
    return Match("avg_pool", [x], {"kernel": size, "stride": size, "channels": channels})


@pattern("flatten", "view", "reshape", "permute", "transpose")
def same(reading: Reading, node: fx.Node) -> Match | None:
    """The pixels in another arrangement, or the channels moved from the first place to the last or back."""
    x, to = reading.value(node.args[0]), shape_of(node)
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
    else:
        return None
    return Match("same", [x], {"channels": channels}, call) if channels else None


def _order(node: fx.Node, dimensions: list[int]) -> list[int]:
    """How a permutation or an exchange orders them."""
    if node.target is aten.permute.default:
        return [dimensions[d] for d in node.args[1]]
    a, b = (dimensions[d] for d in node.args[1:])
    return [b if d == a else a if d == b else d for d in dimensions]


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
    return Match("upsample", [x], {})
