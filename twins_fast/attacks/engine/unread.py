"""Which inputs of a segment PyTorch's backward pass does not read: their memory is free after the forward pass."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from twins_fast.attacks.engine.graph import aten
from twins_fast.attacks.engine.nodes import Node, Ref

# The backward pass of none of these reads an operand. What views give may lie in the memory of their operand.
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.alias.default,
    aten.permute.default, aten.transpose.int, aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.split.Tensor, aten.chunk.default,
    aten.contiguous.default, aten.roll.default, aten.constant_pad_nd.default, operator.getitem,
}  # fmt: skip
_SUMS = {  # and what else gives new memory
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.cat.default, aten.stack.default, aten.mean.dim,
    aten.sum.dim_IntList, aten.clone.default,
}  # fmt: skip
# Nor of these, if all that depends on the images is their first operand: parameters have no gradient here.
_PRODUCTS = {aten.mul.Tensor, aten.div.Tensor, aten.linear.default}


def unread(nodes: list[tuple[int, Node]], takes: Mapping[int, int | None]) -> set[int]:
    """Values among those of ``takes`` (of a segment: node -> value) that no backward pass of ``nodes`` reads."""
    values = {value for value in takes.values() if value is not None}
    lies_in = {index: {value} for index, value in takes.items() if value is not None}
    for index, node in nodes:
        if node.call is None:
            continue
        target, arguments, _ = node.call
        operands = [v for v in node.reads() if isinstance(v, Ref)]
        memory = set().union(*(lies_in.get(operand.index, ()) for operand in operands))
        if target in _VIEWS or (target is aten.pad.default and arguments[2:3] in ((), ("constant",))):
            lies_in[index] = memory
        elif target not in _SUMS and not (target in _PRODUCTS and operands == [arguments[0]]):
            values -= memory
    return values
