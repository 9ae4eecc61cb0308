"""The two-wing layers of a network, and the wing through which it sends a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d

WINGS = ("mix", "adaptive", "frozen")


@contextmanager
def wings(model: nn.Module, wing: str) -> Iterator[nn.Module]:
    """Send every batch through the chosen wing inside the ``with`` block.

    Args:
        model: any module; its two-wing layers are switched, and switched back at the end.
        wing: ``"mix"``, ``"adaptive"`` or ``"frozen"``; ``train()`` and ``eval()`` keep deciding
            about batch statistics.

    Raises:
        ValueError: an unknown wing, or a model without two-wing layers.
    """
    if wing not in WINGS:
        raise ValueError(f"wing must be one of {', '.join(WINGS)}, got {wing!r}")
    layers = require_twin_layers(model)
    before = [layer.wing for layer in layers]
    try:
        for layer in layers:
            layer.wing = wing
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.wing = old


def is_twin(model: nn.Module) -> bool:
    """Whether ``model`` holds at least one two-wing layer."""
    return bool(twin_layers(model))


def twin_layers(model: nn.Module) -> list[TwinBatchNorm2d]:
    """All two-wing layers, each once, in the order of ``modules()``."""
    return [module for module in model.modules() if isinstance(module, TwinBatchNorm2d)]


def require_twin_layers(model: nn.Module) -> list[TwinBatchNorm2d]:
    """:func:`twin_layers`, or a ValueError if there are none."""
    layers = twin_layers(model)
    if not layers:
        raise ValueError("the model has no two-wing batch norm; convert it with convert_twin_bn first")
    return layers
