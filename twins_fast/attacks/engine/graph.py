"""Facts about the nodes of an exported graph, and what has been read of them so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from twins_fast.attacks.engine.nodes import Node, Ref

aten = torch.ops.aten


@dataclass
class Reading:
    """A model, the nodes captured from its graph so far, and what each node of the graph has become.

    Attributes:
        values: node of the graph -> Ref, Param or number.
    """

    model: nn.Module
    nodes: list[Node]
    values: dict[fx.Node, Any]

    def value(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def is_batched(self, x: Any) -> bool:
        return isinstance(x, Ref) and self.nodes[x.index].shape is not None

    def is_image(self, x: Any) -> bool:
        return self.is_batched(x) and len(self.nodes[x.index].shape) == 3


def share_memory(node: fx.Node, source: fx.Node) -> bool:
    """Whether both results share their memory, as the export saw it."""
    values = [n.meta["val"].untyped_storage()._cdata for n in (node, source)]
    return values[0] == values[1]


def is_aten(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def is_switched_off(node: fx.Node) -> bool:
    """Dropout that drops nothing."""
    dropouts = {
        aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
        aten.dropout_.default, aten.feature_dropout_.default, aten.alpha_dropout_.default,
        aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default,
    }  # fmt: skip
    return node.target in dropouts and (node.args[2] is False or node.args[1] == 0)


def draws_nothing(node: fx.Node) -> bool:
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, arguments(node, lambda v: v), strict=True))
    attention = node.target is aten.scaled_dot_product_attention.default and not given["dropout_p"]
    recurrent = {"dropout", "train"} <= given.keys() and not (given["dropout"] and given["train"])
    return is_switched_off(node) or attention or recurrent


def arguments(node: fx.Node, value) -> list[Any]:
    """All arguments of the operation in the order of its schema, with defaults."""
    values = list(node.args)
    for argument in node.target._schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return [fx.node.map_arg(argument, value) for argument in values]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Of the result without the batch; None if it is no batched tensor."""
    result = node.meta.get("val")
    if not isinstance(result, Tensor) or result.dim() == 0 or isinstance(result.shape[0], int):
        return None
    rest = result.shape[1:]
    return tuple(rest) if all(isinstance(size, int) for size in rest) and _is_symbol(result.shape[0]) else None


def _is_symbol(size: torch.SymInt) -> bool:
    """The batch itself, not a multiple of it."""
    return size.node.expr.is_symbol


def size_of(node: fx.Node) -> tuple[int, ...]:
    """Of the result, batch and all."""
    return tuple(node.meta["val"].shape)


def pair(value) -> tuple[int, int]:
    """A size along both axes, which ATen may give as one number."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both if len(both) == 2 else both * 2


def module_of(node: fx.Node) -> str:
    """Dotted name of the module that the operation comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
    path = "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self']").removeprefix(".")
    return path or "the model"
