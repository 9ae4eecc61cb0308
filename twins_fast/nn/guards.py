"""Guards: what may change the result of a module's forward without being seen in it."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_untouched(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what one of these very ``types`` does, and nothing else."""
    return type(module) in types and not has_hooks(module) and "forward" not in module.__dict__
