"""All that a run needs to resume: weights, average, momentum, gradient scaler, a few numbers, in one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from twins_fast.checkpoints import load_checkpoint, load_state, save_checkpoint
from twins_fast.train.average import WeightAverage
from twins_fast.train.dynamics import Dynamics

_WEIGHTS, _MOMENTUM, _UNAVERAGED, _GRADIENTS = "model.", "momentum.", "unaveraged.", "gradients."


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
    dynamics: Dynamics | None,
    meta: dict[str, Any],
) -> None:
    """Write everything, atomically; ``meta`` holds JSON types.

    Raises:
        OSError: the file cannot be written; the one before is still there.
    """
    network, tensors = model.state_dict(), {}
    if average is not None:  # whoever reads the network gets what is evaluated
        tensors = {_UNAVERAGED + name: value.clone() for name, value in model.named_parameters()}
        with average.in_place():
            network = {name: value.clone() for name, value in network.items()}
    tensors |= {_WEIGHTS + name: value for name, value in network.items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[_MOMENTUM + name] = buffer
    if dynamics is not None:
        tensors |= {_GRADIENTS + name: value for name, value in dynamics.state().items()}
    save_checkpoint(path, tensors, {**meta, "scaler": scaler.state_dict()})


def restore_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
    dynamics: Dynamics | None,
) -> dict[str, Any]:
    """Load what :func:`save_state` wrote into the objects, and return its ``meta``.

    Raises:
        CheckpointError: a file that is broken or of another network.
    """
    tensors, meta = load_checkpoint(path)
    load_state(model, _part(tensors, _WEIGHTS))
    if average is not None:
        average.take()
        model.load_state_dict(_part(tensors, _UNAVERAGED), strict=False)
    momentum = _part(tensors, _MOMENTUM)
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(momentum[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
    gradients = _part(tensors, _GRADIENTS)
    if dynamics is not None and gradients:
        dynamics.load_state(gradients)
    scaler.load_state_dict(meta["scaler"])
    return meta


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The network's state dict in a file of :func:`save_state`."""
    return _part(load_checkpoint(path)[0], _WEIGHTS)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
