"""The nodes that a model's forward is captured as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NotCaptured(Exception):
    """The model cannot be captured; the message says why."""


def in_one_line(error: BaseException) -> str:
    """Type and message of an error, for a reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


Call = tuple[Any, tuple, dict]  # function, arguments, keywords; results of nodes are Refs in them, tensors Sources


class Param(NamedTuple):
    """A parameter, buffer or tensor attribute, by its name in the model: read anew at every attack."""

    name: str


@dataclass(frozen=True, eq=False)
class Derived:
    """What an operation makes of parameters alone: computed anew whenever they are read."""

    call: Call


class Ref(NamedTuple):
    """The result of a node, by its index."""

    index: int


Source = Param | Derived


@dataclass
class Node:
    """One operation.

    Attributes:
        op: ``conv``, ``linear``, ``batch_norm``, ``layer_norm``, ``arithmetic`` (with what is the same for all images),
            ``relu``, ``activation``, ``clamp``, ``add``, ``product``, ``max_pool``, ``avg_pool``, ``upsample``,
            ``crop``, ``pad`` (with zeros), ``concat``, ``slice`` and ``shuffle`` (of channels), ``same`` (another shape
            of the same memory), ``flatten`` (in an order that is not the memory's); ``input``; ``rows`` (the number of
            images); ``call`` (any other ATen operation, unchanged).
        inputs: the nodes whose gradient it passes on.
        shape: of its result without the batch; None if that is no batched tensor.
        where: the module that it comes from.
        per_sample: whether each row of the result depends on that row of the batch alone.
        options: what the operation needs to know, Sources included.
        call: what PyTorch runs where the node is not planned.
        dtype: of its result; None if that is no tensor.
    """

    op: str
    inputs: list[int]
    shape: tuple[int, ...] | None
    where: str
    per_sample: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None
    dtype: torch.dtype | None = torch.float32

    def reads(self) -> list[Ref | Source]:
        """What its call reads, in order; what it reads twice is there twice."""
        found: list[Ref | Source] = []
        map_values(found.append, self.call and self.call[1:])
        return found


def map_values(function, value):
    """``value`` with ``function`` applied to every Ref and Source in it."""
    if isinstance(value, (Ref, Param, Derived)):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_values(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_values(function, item) for key, item in value.items()}
    return value


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """The parameter, buffer or tensor attribute of that dotted name; None if there is none."""
    try:
        value = attrgetter(name)(model)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def as_float32(tensor: Tensor) -> Tensor:
    """Half precision in float32, anything else as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 2 else tensor


class Parameters:
    """Parameters of a model as they are now, those of half precision in float32, and what is derived of them."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._derived: dict[Derived, Any] = {}

    def __getitem__(self, source: Source) -> Any:
        if isinstance(source, Param):
            return as_float32(tensor_of(self._model, source.name).detach())
        if source not in self._derived:
            function, arguments, keywords = map_values(self.__getitem__, source.call)
            self._derived[source] = function(*arguments, **keywords)
        return self._derived[source]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes of all modules."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers, module.__dict__):
            yield from ((dot + name, t) for name, t in store.items() if isinstance(t, Tensor))
