"""Which operations keep the samples of a batch apart, so that the batch may be cut into chunks."""

from __future__ import annotations

from math import prod

from torch import fx

from twins_fast.attacks.engine.graph import Reading, arguments, shape_of
from twins_fast.attacks.engine.nodes import Ref

# These do, with any arguments, if all operands are batched.
_ALWAYS = {
    "relu", "relu6", "hardtanh", "clamp", "silu", "sigmoid", "tanh", "gelu", "elu", "leaky_relu", "hardswish", "prelu",
    "hardsigmoid", "mish", "softplus", "exp", "log", "sqrt", "rsqrt", "pow", "neg", "abs", "add", "sub", "mul", "div",
    "conv2d", "conv_transpose2d", "pixel_shuffle", "layer_norm", "group_norm", "linear", "max_pool2d", "avg_pool2d",
    "fill", "zero", "copy", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip


def keeps_samples_apart(reading: Reading, node: fx.Node, name: str, shapes: list[tuple[int, ...]]) -> bool:
    """Whether every sample of the result depends on that sample of the operands alone.

    Args:
        name: of the ATen operation; "" for any other.
        shapes: of the operands, without the batch.
    """
    if name in _ALWAYS and len({len(shape) for shape in shapes}) == 1:
        return True
    rank = len(shapes[0]) + 1
    values = arguments(node, reading.value)
    if name in ("view", "reshape"):  # the batch stays in front, and each sample's values stay together
        first = values[1][0]
        rows = isinstance(first, Ref) and reading.nodes[first.index].op == "rows"
        return (rows or first == -1) and prod(shapes[0]) == prod(shape_of(node))
    if name == "batch_norm":
        return not values[5]
    if name in ("pad", "constant_pad_nd"):
        return len(values[1]) < 2 * rank
    if name == "permute":
        return values[1][0] == 0
    if name == "matmul":
        return len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) > 1
    if name == "scaled_dot_product_attention":
        return len(shapes) == 3 and len(shapes[0]) == 3
    if name in ("mean", "sum", "amax", "amin"):
        dims = [values[1]] if isinstance(values[1], int) else values[1]
        return bool(dims) and all(d % rank for d in dims)
    dims = {
        "cat": [1], "flatten": [1], "softmax": [1], "log_softmax": [1], "transpose": [1, 2], "slice": [1],
        "select": [1], "squeeze": [1], "unflatten": [1], "slice_scatter": [2], "select_scatter": [2],
    }  # fmt: skip
    if name == "unsqueeze":
        return values[1] % (rank + 1) != 0
    return name in dims and all(isinstance(values[i], int) and values[i] % rank for i in dims[name])
