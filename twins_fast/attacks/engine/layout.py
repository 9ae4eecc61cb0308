"""Which dimension of each result holds the channels, which lie side by side in memory.

Convolutions have them first, [N, C, H, W]; layer norms and linear layers last, [N, H, W, C] or [N, T, C]. A permutation
between the two is another name for the same memory.
"""

from __future__ import annotations

from torch import Tensor

from twins_fast.attacks.engine.nodes import Node, NotCaptured

FIRST, LAST = 1, -1
Pairs = list[tuple[int, int]]  # dimensions of an operand and of the result

_TOGETHER: Pairs = [(FIRST, FIRST), (LAST, LAST)]
_ALLOWED: dict[str, Pairs] = {
    "relu": _TOGETHER, "activation": _TOGETHER, "clamp": _TOGETHER, "add": _TOGETHER, "arithmetic": _TOGETHER,
    "linear": [(LAST, LAST)], "layer_norm": [(LAST, LAST)],
}  # fmt: skip


class Layout:
    """The dimension for every node, such that few operations are left to PyTorch.

    Attributes:
        channels: FIRST or LAST, by node; of a row of channels, which are both, it is LAST.
        impossible: nodes whose operand would have to lie in memory in two ways.
    """

    def __init__(self, nodes: list[Node], generic: set[int]):
        self.impossible: set[int] = set()
        self._ties: list[list[tuple[int, Pairs]]] = [[] for _ in nodes]
        self._open = [{FIRST, LAST} for _ in nodes]
        self._rows = [len(node.shape or ()) < 2 for node in nodes]
        self._narrow(0, {FIRST})
        tied = [index for index, node in enumerate(nodes) if index not in generic and node.inputs]
        # What only renames memory gives way to what computes, and that to sums.
        for index in sorted(tied, key=lambda i: (_allowed(nodes[i]) is not _TOGETHER, nodes[i].op == "same")):
            if not all(self._tie(source, index, _allowed(nodes[index])) for source in nodes[index].inputs):
                self.impossible.add(index)
        for index, node in enumerate(nodes):
            usual = {FIRST} if len(node.shape or ()) == 3 else {LAST}
            if not self._narrow(index, usual) and not self._narrow(index, {FIRST, LAST} - usual):
                raise NotCaptured(f"{node.where}: memory in no order suits all that read it")
        self.channels = [LAST if row else next(iter(left)) for row, left in zip(self._rows, self._open, strict=True)]

    def _tie(self, source: int, index: int, allowed: Pairs) -> bool:
        """Whether operand and result can have one of these pairs; if so they have to from now on."""
        self._ties[source].append((index, allowed))
        self._ties[index].append((source, [(y, x) for x, y in allowed]))
        if self._narrow(source, {x for x, _ in allowed}) and self._narrow(index, {y for _, y in allowed}):
            return True
        self._ties[source].pop(), self._ties[index].pop()
        return False

    def _narrow(self, index: int, dimensions: set[int]) -> bool:
        """Leave a node only these, and others what follows from it; if one has none left, False and all as it was."""
        if self._rows[index]:
            return True
        before, changed = list(self._open), [index]
        self._open[index] = self._open[index] & dimensions
        while changed and self._open[changed[-1]]:
            this = changed.pop()
            for other, allowed in self._ties[this]:
                left = self._open[other] & {y for x, y in allowed if x in self._open[this]}
                if left != self._open[other] and not self._rows[other]:
                    self._open[other] = left
                    changed.append(other)
        if changed:
            self._open = before
        return not changed


def _allowed(node: Node) -> Pairs:
    return node.options.get("channels") or _ALLOWED.get(node.op, [(FIRST, FIRST)])


def value_shape(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Of the tensor that holds a result of this ``shape``: an image [C, H, W], or rows [..., C]."""
    image = len(shape) == 3
    if channels == FIRST:
        return shape if image else (*shape[1:], shape[0])
    return (shape[-1], *shape[:-1]) if image else shape


def as_result(tensor: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
    """The memory of a tensor of the arena as a result of ``shape``."""
    rows = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
    if channels == FIRST:
        return rows.view(len(rows), *shape[1:], shape[0]).movedim(-1, 1)
    return rows.view(len(rows), *shape)
