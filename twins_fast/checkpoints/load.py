"""Loading a state dict into a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from twins_fast.checkpoints.names import CheckpointError, covered, is_frozen, layer_of, plain_name
from twins_fast.nn.heads import HEAD, SOURCE_HEAD


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_extra: Iterable[str] = (),
) -> None:
    """Load ``state`` into ``model``; names, shapes and kinds of dtype must agree.

    Floating-point entries are cast to the model's dtype.

    Args:
        model: receives the entries, on whatever device it is.
        state: entry name -> tensor.
        allow_missing: modules or entries (``"fc"`` covers ``fc.weight``, not ``fc_downstream.weight``)
            that the model keeps as they are when ``state`` lacks them.
        allow_extra: modules or entries of ``state`` that the model may lack.

    Raises:
        CheckpointError: lists all entries that are missing, extra, of another shape, floating point
            on one side only, or not finite. The model is unchanged then.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    problems = [f"missing: {name}" for name in sorted(missing) if not covered(name, allow_missing)]
    problems += [f"extra: {name}" for name in sorted(extra) if not covered(name, allow_extra)]
    shared = [name for name in own if name in state]
    problems += [f"{name}: {why}" for name in shared if (why := _mismatch(state[name], own[name], name))]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: state[name] for name in shared}, strict=False)


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Start ``model`` from a pre-trained network; the head ``fc_downstream`` stays fresh.

    A two-wing model takes an ordinary checkpoint's batch norms into both wings; an ordinary model
    takes the adaptive wing of a two-wing checkpoint. The unused head ``fc`` may be absent on either
    side, and so may the input statistics ``mean`` and ``std``, unless they contradict the model's.

    Args:
        model: ordinary, or converted to two-wing layers.
        state: what :func:`read_state_dict` returns.

    Raises:
        CheckpointError: as in :func:`load_state`.
    """
    own, buffers = model.state_dict(), dict(model.named_buffers())
    body = {name: value for name, value in state.items() if not covered(name, ("fc_downstream",))}
    layers_with_frozen_wing = {layer_of(name) for name in body if is_frozen(name)}
    for name in own:
        if is_frozen(name) and layer_of(name) not in layers_with_frozen_wing and plain_name(name) in body:
            body[name] = body[plain_name(name)]
    for name in list(body):
        if name in own:
            continue
        known_statistics = name in ("mean", "std") and name in buffers and _same_values(body[name], buffers[name])
        if known_statistics or (is_frozen(name) and plain_name(name) in own):
            del body[name]
    load_state(model, body, allow_missing=("fc", "fc_downstream", "mean", "std"), allow_extra=("fc",))


def adopt_source_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give ``model`` the head of the pre-training as ``fc``: the checkpoint's ``fc`` or, if it has none, its head.

    Raises:
        CheckpointError: there is no linear head of that name in the checkpoint.
    """
    name = SOURCE_HEAD if f"{SOURCE_HEAD}.weight" in state else HEAD
    entries = {leaf: state.get(f"{name}.{leaf}") for leaf in ("weight", "bias")}
    weight, bias = entries["weight"], entries["bias"]
    if weight is None or weight.dim() != 2:
        raise CheckpointError(f"the checkpoint has no linear head, neither {SOURCE_HEAD} nor {HEAD}")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    load_state(head, {leaf: value for leaf, value in entries.items() if value is not None})
    setattr(model, SOURCE_HEAD, head)


def _mismatch(value: Tensor, own: Tensor, name: str) -> str | None:
    """What is wrong with loading ``value`` into ``own``."""
    if covered(name, (HEAD,)) and value.shape[1:] == own.shape[1:] and len(value) != len(own):
        return f"the checkpoint is for {len(value)} classes, the model for {len(own)}"
    if value.shape != own.shape:
        return f"shape {list(value.shape)} in the checkpoint, {list(own.shape)} in the model"
    if (value.is_floating_point(), value.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"{value.dtype} in the checkpoint, {own.dtype} in the model"
    if not torch.isfinite(value.to(own.dtype)).all():
        return f"NaN or infinite values (as {own.dtype})"
    return None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.allclose(a.flatten().cpu().float(), b.flatten().cpu().float())
