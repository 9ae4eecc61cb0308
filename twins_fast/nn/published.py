"""The two-wing layer under its name in the published code, and what tells such layers of other codebases."""

from __future__ import annotations

from typing import Any

from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d, TwoWingBatchNorm2d

_ORIGINALS = (  # layout, class, child
    ("twins", "MixBatchNorm2d", "main_bn"),
    ("advprop", "MixBatchNorm2d", "aux_bn"),
    ("timm", "SplitBatchNorm2d", "aux_bn"),
    ("ares", "SwitchableBatchNorm2d", "bn_adv"),
)
_WINGS = {"target": "adaptive", "source": "frozen", "mix": "mix"}


class MixBatchNorm2d(TwinBatchNorm2d):
    """:class:`TwinBatchNorm2d` whose wing is chosen by ``batch_type`` (``"target"``, ``"source"`` or ``"mix"``).

    As in the published code it does not follow ``train()`` and ``eval()``, and begins with ``"target"``.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.batch_type = "target"

    @property
    def batch_type(self) -> str:
        return next(name for name, wing in _WINGS.items() if wing == self.wing)

    @batch_type.setter
    def batch_type(self, name: str) -> None:
        if name not in _WINGS:
            raise ValueError(f"batch_type must be one of {', '.join(_WINGS)}, got {name!r}")
        self.wing = _WINGS[name]


def original_layout(module: nn.Module) -> str | None:
    """The key of ``LAYOUTS`` of a layer that is another codebase's own, by the names of its class and its child."""
    if isinstance(module, TwoWingBatchNorm2d):
        return None
    for layout, kind, child in _ORIGINALS:
        if type(module).__name__ == kind and child in module._modules:
            return layout
    return None


def original_child(module: Any) -> Any:
    """The wing that is a child of a layer that has an :func:`original_layout`."""
    child = next(module._modules[name] for _, _, name in _ORIGINALS if name in module._modules)
    return child[0] if isinstance(child, nn.ModuleList) else child
