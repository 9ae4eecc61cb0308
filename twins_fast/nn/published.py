"""The two-wing layer under its name in the published code."""

from __future__ import annotations

from typing import Any

from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d

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


def is_published(module: nn.Module) -> bool:
    """Whether it is the layer of the published code itself."""
    return type(module).__name__ == "MixBatchNorm2d" and not isinstance(module, MixBatchNorm2d)
