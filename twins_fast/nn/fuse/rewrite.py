"""Finds the batch norms, sums and ReLUs that may run as one call, and rewrites the graph so."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from twins_fast.nn.branches import LAYOUTS
from twins_fast.nn.fuse.children import Path, at
from twins_fast.nn.fuse.trace import NotFused
from twins_fast.nn.guards import has_hooks, is_untouched
from twins_fast.nn.layers import TwinBatchNormAct2d, TwoWingBatchNorm2d

_SUM = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}  # -> whether in place
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_PURE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *LAYOUTS.values())


def obstacle(layer: TwoWingBatchNorm2d) -> str:
    """Why no forward may pass residual or ReLU to ``layer``."""
    if type(layer) not in (*LAYOUTS.values(), TwinBatchNormAct2d) or "forward" in layer.__dict__:
        return f"the forward of {type(layer).__name__} is not known"
    if has_hooks(layer):
        return "it has hooks, which would see another result"
    if isinstance(layer, TwinBatchNormAct2d) and not is_untouched(layer.act, nn.Identity):
        return f"{type(layer.act).__name__} is part of it"
    return ""


class _Chain(NamedTuple):
    nodes: list[fx.Node]  # the batch norm first, the one that is replaced last
    residual: fx.Node | None
    in_place: bool  # whether the sum was
    relu: bool
    parts: dict[Path, type]


def rewrite(
    graph: fx.Graph, module: nn.Module, candidates: dict[str, Path]
) -> tuple[dict[str, tuple[str, str]], dict[Path, type]]:
    """Fuse in place what the graph allows.

    Returns:
        (fused, why) of each layer that the graph calls, as in :class:`~twins_fast.nn.fuse.apply.Fusion`; and the
        modules whose exact types the new graph relies on.
    """
    outcomes: dict[str, tuple[str, str]] = {}
    parts: dict[Path, type] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in candidates:
            continue
        fused, why = outcomes.get(node.target, ("", ""))
        try:
            chain = _chain(node, module)
            _check_order(chain, graph, module)
        except NotFused as reason:
            outcomes[node.target] = fused, why or str(reason)
            continue
        _replace(chain, graph)
        parts.update(chain.parts)
        new = "+".join(["add"] * (chain.residual is not None) + ["relu"] * chain.relu)
        outcomes[node.target] = (fused if new in fused.split(", ") else ", ".join(filter(None, (fused, new)))), why
    return outcomes, parts


def _chain(node: fx.Node, module: nn.Module) -> _Chain:
    """The longest chain of sum and ReLU after a batch norm whose intermediate results nothing else reads."""
    if node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        raise NotFused("it is not called with one tensor")
    path = tuple(node.target.split("."))
    layer = at(module, path)
    parts: dict[Path, type] = {path: type(layer)}
    if isinstance(layer, TwinBatchNormAct2d):
        parts[(*path, "act")] = nn.Identity
    nodes, best, residual, in_place = [node], None, None, False
    while True:
        last = nodes[-1]
        try:
            user = _only_user(last)
        except NotFused:
            if best:
                break
            raise
        nodes.append(user)
        if user.op == "call_module":
            path = tuple(user.target.split("."))
            kind = type(at(module, path))
            if kind in (nn.Identity, nn.ReLU) and is_untouched(at(module, path), kind):
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
                raise NotFused("no other tensor is added to it")
            if in_place and first is not last:
                raise NotFused("it is added into another tensor in place")
            best = _Chain(list(nodes), residual, in_place, False, dict(parts))
            continue
        break
    if best is None:
        raise NotFused(_describe(nodes[-1], module))
    return best


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise NotFused(f"its result is used {len(node.users)} times" if node.users else "its result is not used")
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
    child = at(module, tuple(user.target.split(".")))
    if isinstance(child, TwoWingBatchNorm2d):
        return f"{user.target} adds its result, as its residual"
    return f"{type(child).__name__}{' with hooks' if has_hooks(child) else ''} follows it"


def _check_order(chain: _Chain, graph: fx.Graph, module: nn.Module) -> None:
    """Refuse if, before the chain ends, where the batch norm moves to, something may write what it reads or runs it."""
    order = list(graph.nodes)
    start, end = order.index(chain.nodes[0]), order.index(chain.nodes[-1])
    layer = at(module, tuple(chain.nodes[0].target.split(".")))
    summed = end
    for node in chain.nodes:
        if chain.residual in node.all_input_nodes:
            summed = order.index(node)
    read = _memory(chain.nodes[0].args[0], module)
    for position in range(start + 1, end):
        node = order[position]
        if node in chain.nodes or node.target is getattr or not node.op.startswith("call_"):
            continue
        if node.op == "call_module" and layer in at(module, tuple(node.target.split("."))).modules():
            raise NotFused(f"{node.target} runs it too before the sum")
        if is_pure(node, module):
            continue
        if position > summed:
            read = read | _memory(chain.residual, module)
        if any(_memory(value, module) & read for value in node.all_input_nodes):
            raise NotFused(f"{node.target} might write what it reads before the sum")


def is_pure(node: fx.Node, module: nn.Module) -> bool:
    """Whether it calls a layer that neither writes its input nor returns memory of it."""
    return node.op == "call_module" and is_untouched(at(module, tuple(node.target.split("."))), *_PURE)


def _memory(node: fx.Node, module: nn.Module) -> set[fx.Node]:
    """The values that ``node`` may share memory with, itself included."""
    values, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in values:
            continue
        values.add(node)
        if not is_pure(node, module):
            waiting += node.all_input_nodes
    return values


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
