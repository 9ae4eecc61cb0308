"""Two-wing batch norm layers, and the conversion of any network to and from them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.ops import sync, twin_batch_norm
from twins_fast.ops.reference import Wing

WINGS = ("mix", "adaptive", "frozen")
_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")  # classes of one module in timm
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class TwinBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with a frozen and an adaptive wing (TWINS, arXiv 2303.11135, section 4).

    The layer's own weight, bias and running statistics are the adaptive wing; the child ``main_bn``
    is the frozen wing, whose running statistics never change. Both wings' weights and biases are
    trained. The state dict is that of the published code.

    In ``mix`` mode the first ``N // 2`` rows go through the frozen wing and the others through the
    adaptive wing; in ``adaptive`` and ``frozen`` mode all rows go through that one wing. ``train()``
    means mix and ``eval()`` adaptive, unless :func:`wings` says otherwise. As in any batch norm,
    ``training`` alone decides whether the adaptive wing uses (and updates) batch statistics.

    Args:
        num_features: channels C.
        eps: added to the variance, both wings.
        momentum: of the running statistics; ``None`` for a cumulative average.
        affine: whether each wing has its own weight and bias.
        track_running_stats: whether the *adaptive* wing keeps running statistics. The frozen wing
            always has them.
        process_group: processes whose adaptive rows share their batch statistics, as in
            :class:`torch.nn.SyncBatchNorm`: a ``torch.distributed`` group, ``"world"`` for the default
            group, or ``None`` for this process alone. Copies of the layer share the group.

    Shapes:
        x [N, C, H, W], optional residual of that shape -> [N, C, H, W], dtype and memory format of x.

    Raises:
        ValueError: fewer than two values per channel for batch statistics; evaluation without
            running statistics.
        RuntimeError: batch statistics of a ``process_group`` before ``torch.distributed`` is initialised.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: sync.Group = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.main_bn = nn.BatchNorm2d(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self.wing: str | None = None  # set by wings(); None follows train() and eval()
        self.process_group = process_group

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Batch norm of ``x``, then ``+ residual``, then ReLU if ``relu``: one pass over memory where a kernel runs.

        A residual that is not like ``x`` (broadcast, other dtype) is added by PyTorch.
        """
        if residual is not None and not _alike(residual, x):
            y = TwinBatchNorm2d.forward(self, x) + residual
            return F.relu(y) if relu else y
        self._check_input_dim(x)
        rows = x.shape[0]
        wing = self.wing or ("mix" if self.training else "adaptive")
        split = {"mix": rows // 2, "adaptive": 0, "frozen": rows}[wing]
        group = self.process_group if self.training and wing != "frozen" else None
        if group is None or sync.world_size(group) == 1:  # else the rows of all processes count
            self._check_statistics(x, split)
        frozen = self.main_bn
        frozen_wing = (frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias)
        adaptive_wing = (self.running_mean, self.running_var, self.weight, self.bias)
        if not self.training:
            if split in (0, rows):
                return self._normalize(x, frozen_wing if split == rows else adaptive_wing, residual, relu)
            y = torch.cat([self._normalize(x[:split], frozen_wing), self._normalize(x[split:], adaptive_wing)])
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        if split == rows and group is None:
            y = self._normalize(x, frozen_wing, residual, relu)
        else:
            momentum = self.momentum
            if not self.track_running_stats:  # switched off later: no update, as in nn.BatchNorm2d
                adaptive_wing, momentum = (None, None, self.weight, self.bias), 0.0
            elif momentum is None:  # cumulative average
                tracked = self.num_batches_tracked
                momentum = 0.0 if tracked is None else 1.0 / (float(tracked) + 1.0)
            y = twin_batch_norm(
                x, split, frozen_wing, adaptive_wing, momentum, self.eps, residual, relu, process_group=group
            )
            if self.track_running_stats and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        if split > 0 and frozen.num_batches_tracked is not None:
            frozen.num_batches_tracked.add_(1)  # counted by the published code too; nothing reads it
        return y

    def _check_statistics(self, x: Tensor, split: int) -> None:
        """Refuse, before anything is written, what the adaptive wing has no statistics for."""
        rows = x.shape[0] - split
        if rows == 0:
            return
        if not self.training and self.running_mean is None:
            raise ValueError("TwinBatchNorm2d in eval mode needs running statistics, but track_running_stats=False")
        if self.training and rows * x.shape[2] * x.shape[3] < 2:
            raise ValueError(
                f"batch statistics need at least 2 values per channel, but the adaptive wing got {rows} row(s) "
                f"of {x.shape[2]} x {x.shape[3]} pixels from a batch of {x.shape[0]}"
            )

    def _normalize(self, x: Tensor, wing: Wing, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """All of ``x`` with the running statistics of ``wing``."""
        if x.numel() == 0 or (residual is None and not relu):
            return F.batch_norm(x, *wing, training=False, eps=self.eps)
        return twin_batch_norm(x, x.shape[0], wing, (None,) * 4, 0.0, self.eps, residual, relu)

    def __deepcopy__(self, memo: dict) -> TwinBatchNorm2d:
        memo[id(self.process_group)] = self.process_group  # a connection: shared, as it cannot be copied
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        text = super().extra_repr() + (f", wing={self.wing}" if self.wing else "")
        return text + (", synchronised" if self.process_group is not None else "")


class TwinBatchNormAct2d(TwinBatchNorm2d):
    """Two-wing batch norm followed by ``drop`` and ``act``, as timm's ``BatchNormAct2d`` is laid out.

    ``forward(x, residual, relu)`` is ``act(drop(batch norm of x) + residual)``, then ReLU if ``relu``. An
    ``act`` that is a plain ``nn.ReLU`` or ``nn.Identity`` is computed with the batch norm unless ``drop``
    drops something.

    Args:
        plain: the layer to take the modules and (for :func:`revert_twin_bn`) the class from.
        options: as in :class:`TwinBatchNorm2d`.
    """

    def __init__(self, plain: nn.BatchNorm2d | nn.SyncBatchNorm, **options):
        super().__init__(plain.num_features, **options)
        self.plain_type = type(plain)
        self.drop = plain.drop
        self.act = plain.act

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if self.fuses_act():
            return super().forward(x, residual, relu or type(self.act) is nn.ReLU)
        y = self.drop(super().forward(x))
        y = self.act(y if residual is None else y + residual)
        return F.relu(y) if relu else y

    def fuses_act(self) -> bool:
        """Whether drop and act are computed with the batch norm."""
        drop, act = self.drop, self.act
        if not is_untouched(drop, nn.Identity, nn.Dropout, nn.Dropout2d) or not is_untouched(act, nn.Identity, nn.ReLU):
            return False
        return type(drop) is nn.Identity or not drop.training or drop.p == 0


def convert_twin_bn(model: nn.Module) -> nn.Module:
    """Replace every ``BatchNorm2d`` of ``model`` by a two-wing layer, both wings starting from it.

    Works in place on the children (the adaptive wing keeps the very same parameters and buffers, so
    an existing optimiser still holds them); a ``model`` that is itself a batch norm is returned
    converted. eps, momentum, affine, dtype, device and the train/eval flag are kept. timm's
    ``BatchNormAct2d`` keeps its activation. A ``SyncBatchNorm`` (which is taken for a two-dimensional
    one) keeps its process group. Layers that are already two-wing are left alone.

    Raises:
        ValueError: a batch norm without running statistics, which the frozen wing would need; one with
            hooks, which would be lost; no batch norm at all. Nothing is changed then.
        TypeError: a subclass of ``BatchNorm2d`` whose forward is not known here.
    """
    frozen = {twin.main_bn for twin in twin_layers(model)}
    found = bool(frozen)
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_plain_bn(module) and module not in frozen:
            _check_convertible(name or "the model", module)
            found = True
    if not found:
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


@contextmanager
def wings(model: nn.Module, wing: str) -> Iterator[nn.Module]:
    """Send every batch through the chosen wing inside the ``with`` block.

    Args:
        model: any module; its two-wing layers are switched, and switched back at the end.
        wing: ``"mix"``, ``"adaptive"`` or ``"frozen"``; ``train()`` and ``eval()`` keep deciding
            about batch statistics.

    Raises:
        ValueError: an unknown wing, or a model without two-wing layers.
    """
    if wing not in WINGS:
        raise ValueError(f"wing must be one of {', '.join(WINGS)}, got {wing!r}")
    layers = require_twin_layers(model)
    before = [layer.wing for layer in layers]
    try:
        for layer in layers:
            layer.wing = wing
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.wing = old


def is_twin(model: nn.Module) -> bool:
    """Whether ``model`` holds at least one two-wing layer."""
    return bool(twin_layers(model))


def twin_layers(model: nn.Module) -> list[TwinBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, TwinBatchNorm2d)]


def require_twin_layers(model: nn.Module) -> list[TwinBatchNorm2d]:
    layers = twin_layers(model)
    if not layers:
        raise ValueError("the model has no two-wing batch norm; convert it with convert_twin_bn first")
    return layers


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_untouched(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what one of these very ``types`` does, and nothing else."""
    return type(module) in types and not has_hooks(module) and "forward" not in module.__dict__


def unfused_type(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before :func:`twins_fast.fuse_twin_bn`."""
    return type(module).__dict__.get("unfused_type", type(module))


def _alike(residual: Tensor, x: Tensor) -> bool:
    """Whether the op takes this residual."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _is_plain_bn(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not isinstance(module, TwinBatchNorm2d)


def _is_timm_bn_act(module: nn.Module) -> bool:
    return type(module).__name__ in _TIMM and hasattr(module, "drop") and hasattr(module, "act")


def _check_convertible(name: str, module: nn.Module) -> None:
    if has_hooks(module):
        raise ValueError(f"cannot convert {name}: it has hooks, which would be lost")
    if type(module) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not _is_timm_bn_act(module):
        raise TypeError(f"cannot convert {name}: the forward of {type(module).__qualname__} is not known")
    if module.running_mean is None:
        raise ValueError(f"cannot convert {name}: it has no running statistics for the frozen wing to use")


def _replace(module: nn.Module, wanted, build, done: dict[nn.Module, nn.Module]) -> nn.Module:
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


def _options(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> dict:
    return {
        "eps": bn.eps,
        "momentum": bn.momentum,
        "affine": bn.affine,
        "track_running_stats": bn.track_running_stats,
    }


def _share(source: nn.BatchNorm2d, target: nn.BatchNorm2d) -> None:
    """Let ``target`` hold the very parameters and buffers of ``source``."""
    for name in _ENTRIES:
        setattr(target, name, getattr(source, name))
    target.train(source.training)


def _twin_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> TwinBatchNorm2d:
    options = {**_options(bn), "device": bn.running_mean.device, "dtype": bn.running_mean.dtype}
    if isinstance(bn, nn.SyncBatchNorm):
        options["process_group"] = bn.process_group or "world"
    if _is_timm_bn_act(bn):
        twin: TwinBatchNorm2d = TwinBatchNormAct2d(bn, **options)
    else:
        twin = TwinBatchNorm2d(bn.num_features, **options)
    frozen = twin.main_bn
    with torch.no_grad():
        for name in _ENTRIES:
            if getattr(bn, name) is None:
                setattr(frozen, name, None)
            else:
                getattr(frozen, name).copy_(getattr(bn, name))
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(getattr(bn, name).requires_grad)
    _share(bn, twin)
    return twin


def _plain_of(twin: TwinBatchNorm2d) -> nn.BatchNorm2d | nn.SyncBatchNorm:
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
