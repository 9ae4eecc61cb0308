"""Conversion of any network to two-wing batch norm and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn

from twins_fast.nn.branches import LAYOUTS
from twins_fast.nn.fuse.apply import unfused_type
from twins_fast.nn.guards import has_hooks
from twins_fast.nn.layers import BatchNormAct, TwinBatchNormAct2d, TwoWingBatchNorm2d
from twins_fast.nn.published import MixBatchNorm2d, original_child, original_layout
from twins_fast.nn.wings import require_two_wing_layers, two_wing_layers
from twins_fast.validation import check_choice

PlainBatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm  # two-wing layers are no plain ones, though they inherit

_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")  # classes of one module in timm


class _Empty:
    """What a class has from the statement alone."""

    value: int


_HARMLESS = {"__init__", "extra_repr", "__repr__", *vars(_Empty)}
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_twin_bn(model: nn.Module, layout: str = "twins") -> nn.Module:
    """Replace every ``BatchNorm2d`` of ``model`` by a two-wing layer, both wings starting from it.

    Works in place on the children (the adaptive or main wing keeps the very same parameters and buffers, so
    an existing optimiser still holds them); a ``model`` that is itself a batch norm is returned
    converted. eps, momentum, affine, dtype, device and the train/eval flag are kept. timm's
    ``BatchNormAct2d`` keeps its activation. A ``SyncBatchNorm`` (which is taken for a two-dimensional
    one) keeps its process group. Layers that are already two-wing are left alone.

    Layers of another codebase with two wings of their own become ours with the very parameters of both,
    and state dicts of theirs are state dicts of ours.

    Args:
        model: changed in place and returned.
        layout: how the two wings are named and which rows go where: ``"twins"``, with a frozen wing
            (:class:`TwinBatchNorm2d`; of a ``MixBatchNorm2d`` of the published code,
            :class:`twins_fast.compat.twins.MixBatchNorm2d`), or one with two adaptive wings: ``"advprop"``
            (:class:`AdvPropBatchNorm2d`), ``"timm"`` (:class:`SplitBatchNorm2d`), ``"ares"``
            (:class:`SwitchableBatchNorm2d`).

    Raises:
        ValueError: an unknown layout; a layer of another one; a batch norm without running statistics, which
            the other wing would need; one with hooks, which would be lost; wings of different eps or
            momentum, or more than two; no batch norm at all. Nothing is changed then.
        TypeError: a subclass of ``BatchNorm2d`` that is not known here and adds something to it.
    """
    check_choice("layout", layout, LAYOUTS)
    twins = two_wing_layers(model)
    for twin in twins:
        if not isinstance(twin, LAYOUTS[layout]):
            raise ValueError(f"the model has two-wing layers of another layout than {layout!r}: {type(twin).__name__}")
    children = {twin.child_wing for twin in twins}
    plain = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_plain_bn(module) and module not in children
    ]
    for name, module in plain:
        _check_convertible(name or "the model", module, layout)
    if not twins and not plain:
        raise ValueError("the model has no BatchNorm2d to convert")
    return _replace(model, _is_plain_bn, lambda bn: _twin_of(bn, layout), {})


def revert_twin_bn(model: nn.Module) -> nn.Module:
    """The inverse of :func:`convert_twin_bn`: an ordinary network that holds the adaptive (or main) wing.

    In place like :func:`convert_twin_bn`; the other wing is dropped. Layers with a process group become
    ``SyncBatchNorm``, and what :func:`twins_fast.fuse_twin_bn` did is undone.
    """
    for module in model.modules():
        module.__class__ = unfused_type(module)
    return _replace(model, lambda module: isinstance(module, TwoWingBatchNorm2d), _plain_of, {})


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
    for layer in require_two_wing_layers(model):
        layer.process_group = group
    return model


def _is_plain_bn(module: nn.Module) -> TypeGuard[PlainBatchNorm]:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not isinstance(module, TwoWingBatchNorm2d)


def _is_timm_bn_act(module: nn.Module) -> TypeGuard[BatchNormAct]:
    return type(module).__name__ in _TIMM and hasattr(module, "drop") and hasattr(module, "act")


def _check_convertible(name: str, module: PlainBatchNorm, layout: str) -> None:
    if has_hooks(module):
        raise ValueError(f"cannot convert {name}: it has hooks, which would be lost")
    kind, own = type(module).__qualname__, original_layout(module)
    if not (_is_plain_kind(module) or own or (_is_timm_bn_act(module) and layout == "twins")):
        raise TypeError(f"cannot convert {name} to layout {layout!r}: what {kind} adds to BatchNorm2d is not known")
    if module.running_mean is None:
        raise ValueError(f"cannot convert {name}: it has no running statistics for the other wing to use")
    if own is None:
        return
    if own != layout:
        raise ValueError(f"cannot convert {name} to layout {layout!r}: {kind} has that of {own!r}")
    if getattr(module, "num_splits", 2) != 2:
        raise ValueError(f"cannot convert {name}: two wings are known here, not {module.num_splits}")
    child = original_child(module)
    if own != "twins" and (child.eps, child.momentum) != (module.eps, module.momentum):
        raise ValueError(f"cannot convert {name}: its wings differ in eps or momentum")


def _is_plain_kind(module: nn.Module) -> bool:
    """Whether it is a batch norm of PyTorch, or of a subclass that only sets other defaults."""
    base = nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else nn.BatchNorm2d
    if type(module) is base:
        return True
    own = {name for kind in type(module).__mro__ if kind not in base.__mro__ for name in vars(kind)}
    stores = ("_parameters", "_buffers", "_modules")
    plain = base(1)
    alike = all(vars(module)[store].keys() == vars(plain)[store].keys() for store in stores)
    return alike and own <= _HARMLESS and vars(module).keys() == vars(plain).keys()


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
    if isinstance(module, TwoWingBatchNorm2d):  # its other wing stays a plain batch norm
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


def _twin_of(bn: PlainBatchNorm, layout: str) -> TwoWingBatchNorm2d:
    statistics = bn.get_buffer("running_mean")
    options = {**_options(bn), "device": statistics.device, "dtype": statistics.dtype}
    if isinstance(bn, nn.SyncBatchNorm):
        options["process_group"] = bn.process_group or "world"
    own = original_layout(bn)
    if _is_timm_bn_act(bn):
        twin: TwoWingBatchNorm2d = TwinBatchNormAct2d(bn, **options)
    elif own == "twins":
        twin = MixBatchNorm2d(bn.num_features, **options)
    else:
        twin = LAYOUTS[layout](bn.num_features, **options)
    if own:
        _share(original_child(bn), twin.child_wing)
        for name in ("batch_type", "bn_mode"):
            if hasattr(bn, name):
                setattr(twin, name, getattr(bn, name))
    else:
        _copy(bn, twin.child_wing)
    _share(bn, twin)
    return twin


def _copy(source: PlainBatchNorm, target: PlainBatchNorm) -> None:
    with torch.no_grad():
        for name in _ENTRIES:
            if getattr(source, name) is None:
                setattr(target, name, None)
            else:
                getattr(target, name).copy_(getattr(source, name))
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(getattr(source, name).requires_grad)


def _plain_of(twin: TwoWingBatchNorm2d) -> PlainBatchNorm:
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
