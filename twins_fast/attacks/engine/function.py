"""A function of images as a module, so that an attack can treat both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from twins_fast.attacks.engine.reads import Reads


class Function(nn.Module):
    """Calls ``function``, whose networks are its children."""

    __slots__ = ("function",)  # no attribute, as what a plan depends on keeps its attributes alive, and goes with it

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.networks = nn.ModuleList()
        self.look()

    def look(self) -> None:
        """Find the networks that the function reads now."""
        reads = Reads()
        reads.follow(self.function)
        found = reads.modules()
        if found != list(self.networks):
            self.networks = nn.ModuleList(found)

    @property
    def owner(self) -> Any:
        """What plans go with: the function, or the module where no weak reference can be had of that."""
        return self.function if type(self.function).__weakrefoffset__ else self

    def __reduce__(self) -> tuple:
        return Function, (self.function,)

    def forward(self, images: Any) -> Any:
        return self.function(images)


def as_module(model: Any) -> nn.Module:
    """A module as it is, any other callable as a :class:`Function`.

    Raises:
        TypeError: neither.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function of images, got {type(model).__name__}")
    return Function(model)


def look_again(model: nn.Module) -> None:
    """Have a :class:`Function` find its networks as they are now."""
    if isinstance(model, Function):
        model.look()
