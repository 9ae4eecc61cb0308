"""What a trace of a module's forward cannot see: hooks, replaced forwards, random numbers."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # attributes of a module


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself, not its children, has forward or backward hooks."""
    return any(getattr(module, name, None) for name in HOOKS)


def computed_by_hooks(module: nn.Module) -> set[str]:
    """Attributes that PyTorch's ``weight_norm`` and ``spectral_norm`` make of parameters before every forward."""
    hooks = module._forward_pre_hooks.values() if module._forward_pre_hooks else ()
    return {hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


def has_other_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has hooks besides those of :func:`computed_by_hooks`."""
    return sum(len(getattr(module, name, None) or ()) for name in HOOKS) > len(computed_by_hooks(module))


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules of the process."""
    return any(getattr(nn.modules.module, f"_global{name}", None) for name in HOOKS)


def is_untouched(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly one of ``types``, without hooks or a forward of its own."""
    return module is not None and type(module) in types and not has_hooks(module) and "forward" not in module.__dict__


@contextmanager
def random_numbers_restored() -> Iterator[list[str]]:
    """Restore the global generators of Python, NumPy and PyTorch (on the CPU) after the block.

    Yields:
        a list that holds, once the block has ended, which of ``"random"``, ``"numpy"`` and ``"torch"`` it drew from.
    """
    drawn: list[str] = []
    before = _generator_states()
    try:
        yield drawn
    finally:
        after = _generator_states()
        drawn += [name for name, state in before.items() if pickle.dumps(state) != pickle.dumps(after[name])]
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])
        torch.set_rng_state(torch.from_numpy(before["torch"]))


def _generator_states() -> dict[str, Any]:
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy(),
    }
