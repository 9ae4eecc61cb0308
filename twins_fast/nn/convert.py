"""Conversion of any network to two-wing batch norm and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn

from twins_fast.nn.fuse.apply import unfused_type
from twins_fast.nn.guards import has_hooks
from twins_fast.nn.layers import BatchNormAct, TwinBatchNorm2d, TwinBatchNormAct2d
from twins_fast.nn.published import MixBatchNorm2d, is_published
from twins_fast.nn.wings import require_twin_layers, twin_layers

PlainBatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm  # two-wing layers are no plain ones, though they inherit

_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")  # classes of one module in timm
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_twin_bn(model: nn.Module) -> nn.Module:
    """Replace every ``BatchNorm2d`` of ``model`` by a two-wing layer, both wings starting from it.

    Works in place on the children (the adaptive wing keeps the very same parameters and buffers, so
    an existing optimiser still holds them); a ``model`` that is itself a batch norm is returned
    converted. eps, momentum, affine, dtype, device and the train/eval flag are kept. timm's
    ``BatchNormAct2d`` keeps its activation. A ``MixBatchNorm2d`` of the published code becomes ours
    (:class:`twins_fast.compat.twins.MixBatchNorm2d`) with both of its wings. A ``SyncBatchNorm``
    (which is taken for a two-dimensional one) keeps its process group. Layers that are already
    two-wing are left alone.

    Raises:
        ValueError: a batch norm without running statistics, which the frozen wing would need; one with
            hooks, which would be lost; no batch norm at all. Nothing is changed then.
        TypeError: a subclass of ``BatchNorm2d`` whose forward is not known here.
    """
    frozen = {twin.main_bn for twin in twin_layers(model)}
    plain = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_plain_bn(module) and module not in frozen
    ]
    for name, module in plain:
        _check_convertible(name or "the model", module)
    if not frozen and not plain:
        raise ValueError("the model has no BatchNorm2d to convert")
    return _replace(model, _is_plain_bn, _twin_of, {})


def revert_twin_bn(model: nn.Module) -> nn.Module:
    """The inverse of :func:`convert_twin_bn`: an ordinary network that holds the adaptive wing.

    In place like :func:`convert_twin_bn`; the frozen wing is dropped. Layers with a process group become
    ``SyncBatchNorm``, and what :func:`twins_fast.fuse_twin_bn` did is undone.
    """
    for module in model.modules():
        module.__class__ = unfused_type(module)
    return _replace(model, lambda module: isinstance(module, TwinBatchNorm2d), _plain_of, {})


def convert_sync_twin_bn(model: nn.Module, process_group: torch.distributed.ProcessGroup | None = None) -> nn.Module:
    """Let every two-wing layer take its batch statistics over a group of processes.

    The adaptive rows of all processes are then normalised as one batch, and the gradient is that of
    one batch. Gradients of weight and bias stay those of this process's rows, as in
    :class:`torch.nn.SyncBatchNorm`: ``DistributedDataParallel`` averages them.

    Args:
        model: changed in place and returned. All processes must run its layers in the same order.
        process_group: ``None`` is the default group, looked up when a batch arrives.

    Raises:
        ValueError: a model without two-wing layers.
    """
    group = "world" if process_group is None else process_group
    for layer in require_twin_layers(model):
        layer.process_group = group
    return model


def _is_plain_bn(module: nn.Module) -> TypeGuard[PlainBatchNorm]:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not isinstance(module, TwinBatchNorm2d)


def _is_timm_bn_act(module: nn.Module) -> TypeGuard[BatchNormAct]:
    return type(module).__name__ in _TIMM and hasattr(module, "drop") and hasattr(module, "act")


def _check_convertible(name: str, module: nn.Module) -> None:
    if has_hooks(module):
        raise ValueError(f"cannot convert {name}: it has hooks, which would be lost")
    known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_timm_bn_act(module) or is_published(module)
    if not known:
        raise TypeError(f"cannot convert {name}: the forward of {type(module).__qualname__} is not known")
    if module.running_mean is None:
        raise ValueError(f"cannot convert {name}: it has no running statistics for the frozen wing to use")


def _replace(
    module: nn.Module,
    wanted: Callable[[nn.Module], bool],
    build: Callable[[Any], nn.Module],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    """Depth-first replacement; ``done`` keeps a layer that is shared between two places shared."""
    if module in done:
        return done[module]
    if wanted(module):
        done[module] = build(module)
        return done[module]
    done[module] = module
    if isinstance(module, TwinBatchNorm2d):  # its frozen wing stays a plain batch norm
        return module
    for name, child in list(module._modules.items()):  # named_children() leaves a shared layer's second place out
        if child is None:
            continue
        new = _replace(child, wanted, build, done)
        if new is not child:
            setattr(module, name, new)
    return module


def _options(bn: PlainBatchNorm) -> dict[str, Any]:
    return {
        "eps": bn.eps,
        "momentum": bn.momentum,
        "affine": bn.affine,
        "track_running_stats": bn.track_running_stats,
    }


def _share(source: PlainBatchNorm, target: PlainBatchNorm) -> None:
    """Let ``target`` hold the very parameters and buffers of ``source``."""
    for name in _ENTRIES:
        setattr(target, name, getattr(source, name))
    target.train(source.training)


def _twin_of(bn: PlainBatchNorm) -> TwinBatchNorm2d:
    statistics = bn.get_buffer("running_mean")
    options = {**_options(bn), "device": statistics.device, "dtype": statistics.dtype}
    if isinstance(bn, nn.SyncBatchNorm):
        options["process_group"] = bn.process_group or "world"
    start: Any = bn  # of the frozen wing
    if _is_timm_bn_act(bn):
        twin: TwinBatchNorm2d = TwinBatchNormAct2d(bn, **options)
    elif is_published(bn):
        start = bn.main_bn
        twin = published = MixBatchNorm2d(bn.num_features, **options)
        published.batch_type = str(bn.batch_type)
    else:
        twin = TwinBatchNorm2d(bn.num_features, **options)
    frozen = twin.main_bn
    with torch.no_grad():
        for name in _ENTRIES:
            if getattr(start, name) is None:
                setattr(frozen, name, None)
            else:
                getattr(frozen, name).copy_(getattr(start, name))
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(getattr(start, name).requires_grad)
    _share(bn, twin)
    return twin


def _plain_of(twin: TwinBatchNorm2d) -> PlainBatchNorm:
    options, group = _options(twin), twin.process_group
    if group is not None:
        options["process_group"] = None if group == "world" else group
    if isinstance(twin, TwinBatchNormAct2d):
        kind = twin.plain_type
        if issubclass(kind, nn.SyncBatchNorm) != (group is not None):  # synchronised since, or no longer
            kind = getattr(sys.modules[kind.__module__], _TIMM[group is not None])
        bn = kind(twin.num_features, **options)
        bn.drop, bn.act = twin.drop, twin.act
    else:
        bn = (nn.BatchNorm2d if group is None else nn.SyncBatchNorm)(twin.num_features, **options)
    _share(twin, bn)
    return bn
