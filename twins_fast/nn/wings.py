"""The two-wing layers of a network, and the wing through which it sends a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d, TwoWingBatchNorm2d
from twins_fast.validation import check_choice


@contextmanager
def wings(model: nn.Module, wing: str) -> Iterator[nn.Module]:
    """Send every batch through the chosen wing inside the ``with`` block.

    Args:
        model: any module; its two-wing layers are switched, and switched back at the end.
        wing: ``"mix"``, or ``"adaptive"`` or ``"frozen"``; of layouts with an auxiliary wing ``"main"`` or
            ``"auxiliary"``. ``train()`` and ``eval()`` keep deciding about batch statistics.

    Raises:
        ValueError: an unknown wing, or a model without two-wing layers.
    """
    layers = require_two_wing_layers(model)
    for layer in layers:
        check_choice("wing", wing, ("mix", *layer.wing_names))
    before = [layer.wing for layer in layers]
    try:
        for layer in layers:
            layer.wing = wing
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.wing = old


def is_twin(model: nn.Module) -> bool:
    """Whether ``model`` holds at least one layer with a frozen wing."""
    return bool(twin_layers(model))


def twin_layers(model: nn.Module) -> list[TwinBatchNorm2d]:
    """All layers with a frozen wing, as in :func:`two_wing_layers`."""
    return [layer for layer in two_wing_layers(model) if isinstance(layer, TwinBatchNorm2d)]


def two_wing_layers(model: nn.Module) -> list[TwoWingBatchNorm2d]:
    """All two-wing layers, each once, in the order of ``modules()``."""
    return [module for module in model.modules() if isinstance(module, TwoWingBatchNorm2d)]


def require_two_wing_layers(model: nn.Module) -> list[TwoWingBatchNorm2d]:
    """:func:`two_wing_layers`, or a ValueError if there are none."""
    layers = two_wing_layers(model)
    if not layers:
        raise ValueError("the model has no two-wing batch norm; convert it with convert_twin_bn first")
    return layers
