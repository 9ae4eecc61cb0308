"""Rewriting any supported checkpoint with canonical names and the wings asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twins_fast.checkpoints.formats import file_format
from twins_fast.checkpoints.names import CheckpointError, frozen_name, is_frozen, layer_of, leaf_of, plain_name
from twins_fast.checkpoints.read import read_state_dict
from twins_fast.checkpoints.write import serialize, write_atomically

WINGS = ("keep", "adaptive", "frozen", "twin")

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")


def convert_checkpoint(source: str | Path, target: str | Path, *, wings: str = "keep") -> dict[str, Any]:
    """Rewrite any supported checkpoint as safetensors with canonical names.

    Args:
        source: what :func:`read_state_dict` reads.
        target: the new file; an existing one is replaced.
        wings: ``"keep"`` changes nothing; ``"adaptive"`` and ``"frozen"`` make an ordinary network of
            that wing; ``"twin"`` makes two equal wings of every ordinary batch norm.

    Returns:
        ``{"entries", "parameters", "source_format", "wings"}``; ``parameters`` counts elements,
        running statistics and input statistics left out.

    Raises:
        CheckpointError: unreadable; without the wings asked for; NaN or infinite values in what would be
            written; or ``target`` is the source.
    """
    if wings not in WINGS:
        raise ValueError(f"wings must be one of {', '.join(WINGS)}, got {wings!r}")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise CheckpointError(f"{target}: the target is the source; choose another name")
    state = read_state_dict(source)
    try:
        state = _SELECT[wings](state)
        _require_finite(state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: cannot convert with wings={wings!r}: {error}") from None
    summary = {
        "entries": len(state),
        "parameters": sum(value.numel() for name, value in state.items() if leaf_of(name) not in _BUFFERS),
        "source_format": file_format(source),
        "wings": wings,
    }
    write_atomically(Path(target), serialize(state, summary))
    return summary


def _plain_bn_entries(state: Mapping[str, Tensor]) -> list[str]:
    """Adaptive-wing or ordinary entries of every batch norm: of layers with a ``running_mean``."""
    layers = {layer_of(name) for name in state if leaf_of(name) == "running_mean"}
    return [name for name in state if layer_of(name) in layers and not is_frozen(name)]


def _adaptive_wing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = [name for name in state if is_frozen(name)]
    _require(frozen, "it has no two-wing layers")
    _require_entries(state, [plain_name(name) for name in frozen])
    return {name: value for name, value in state.items() if not is_frozen(name)}


def _frozen_wing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = {plain_name(name): value for name, value in state.items() if is_frozen(name)}
    _require(frozen, "it has no two-wing layers")
    _require_entries(state, [frozen_name(name) for name in _plain_bn_entries(state)])
    return {name: value for name, value in state.items() if not is_frozen(name)} | frozen


def _twin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    _require(not any(map(is_frozen, state)), "it has two wings already")
    plain = _plain_bn_entries(state)
    _require(plain, "it has no batch norm with running statistics")
    return state | {frozen_name(name): state[name] for name in plain}


_SELECT: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "keep": dict,
    "adaptive": _adaptive_wing,
    "frozen": _frozen_wing,
    "twin": _twin,
}


def _require(condition: object, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _require_entries(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    lacking = [name for name in names if name not in state]
    _require(not lacking, f"it lacks {', '.join(lacking)}")


def _require_finite(state: Mapping[str, Tensor]) -> None:
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of its {len(state)} entries have NaN or infinite values, the first is {broken[0]}"
        )
