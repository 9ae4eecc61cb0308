"""Where a loss that is not finite began."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def origin(model: nn.Module, images: Tensor) -> str:
    """Which layer of a network in train mode is the first with an output that is not finite, in words.

    Args:
        model: stays as it is.
        images: clean ones; what an attack or a loss does to them is not looked at.
    """
    model, found = copy.deepcopy(model), []

    def looking(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                own = [f"{name}.{own}" for own, value in module.named_parameters() if not value.isfinite().all()]
                found.append(f"{name!r}" + (f", as {own[0]} is not finite" if own else ""))

        return look

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(looking(name))
    with torch.no_grad():
        model(images)
    if found:
        return f"on clean images the first output that is not finite is that of {found[0]}"
    return "on clean images every layer's output is finite, so it began in the attack or in the loss"
