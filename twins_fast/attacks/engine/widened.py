"""A model of half precision in float32, in which its forward is captured and its plan compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from twins_fast.attacks.engine.nodes import as_float32
from twins_fast.nn.modes import modules_of


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside the block parameters, buffers and attributes of half precision are copies in float32."""
    copies: dict[Tensor, Tensor] = {}  # what several modules share stays shared
    before: list[tuple[dict, str, Tensor]] = []
    try:
        for module in modules_of(model):
            for store in (module._parameters, module._buffers, vars(module)):
                for name, tensor in store.items():
                    if isinstance(tensor, Tensor) and as_float32(tensor) is not tensor:
                        before.append((store, name, tensor))
                        store[name] = copies.setdefault(tensor, _wide(tensor))
        yield
    finally:
        for store, name, tensor in before:
            store[name] = tensor


def _wide(tensor: Tensor) -> Tensor:
    wide = as_float32(tensor.detach())
    return nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide
