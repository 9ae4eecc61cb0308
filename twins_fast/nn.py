"""Two-wing batch norm layers, and the conversion of any network to and from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.ops import twin_batch_norm

WINGS = ("mix", "adaptive", "frozen")
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

    Shapes:
        [N, C, H, W] -> [N, C, H, W], same dtype and memory format.

    Raises:
        ValueError: fewer than two values per channel for batch statistics; evaluation without
            running statistics.
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
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.main_bn = nn.BatchNorm2d(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self.wing: str | None = None  # set by wings(); None follows train() and eval()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        rows = x.shape[0]
        wing = self.wing or ("mix" if self.training else "adaptive")
        split = {"mix": rows // 2, "adaptive": 0, "frozen": rows}[wing]
        self._check_statistics(x, split)
        frozen = self.main_bn
        frozen_wing = (frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias)
        adaptive_wing = (self.running_mean, self.running_var, self.weight, self.bias)
        if self.training and split > 0 and frozen.num_batches_tracked is not None:
            frozen.num_batches_tracked.add_(1)  # counted by the published code too; nothing reads it
        if split == rows:
            return self._normalize(x, *frozen_wing)
        if not self.training:
            adaptive = self._normalize(x[split:], *adaptive_wing)
            return adaptive if split == 0 else torch.cat([self._normalize(x[:split], *frozen_wing), adaptive])
        if not self.track_running_stats:  # switched off later: batch statistics without an update, as in nn.BatchNorm2d
            return twin_batch_norm(x, split, frozen_wing, (None, None, self.weight, self.bias), 0.0, self.eps)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # cumulative average
            momentum = 0.0 if self.num_batches_tracked is None else 1.0 / float(self.num_batches_tracked)
        return twin_batch_norm(x, split, frozen_wing, adaptive_wing, momentum, self.eps)

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

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", wing={self.wing}" if self.wing else "")


class TwinBatchNormAct2d(TwinBatchNorm2d):
    """Two-wing batch norm followed by ``drop`` and ``act``, as timm's ``BatchNormAct2d`` is laid out.

    Args:
        plain: the layer to take the modules and (for :func:`revert_twin_bn`) the class from.
        options: as in :class:`TwinBatchNorm2d`.
    """

    def __init__(self, plain: nn.BatchNorm2d, **options):
        super().__init__(plain.num_features, **options)
        self.plain_type = type(plain)
        self.drop = plain.drop
        self.act = plain.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def convert_twin_bn(model: nn.Module) -> nn.Module:
    """Replace every ``BatchNorm2d`` of ``model`` by a two-wing layer, both wings starting from it.

    Works in place on the children (the adaptive wing keeps the very same parameters and buffers, so
    an existing optimiser still holds them); a ``model`` that is itself a batch norm is returned
    converted. eps, momentum, affine, dtype, device and the train/eval flag are kept. timm's
    ``BatchNormAct2d`` keeps its activation. Layers that are already two-wing are left alone.

    Raises:
        ValueError: a batch norm without running statistics, which the frozen wing would need; one with
            hooks, which would be lost; a ``SyncBatchNorm``; no batch norm at all. Nothing is changed then.
        TypeError: a subclass of ``BatchNorm2d`` whose forward is not known here.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_plain_bn(module) or isinstance(module, nn.SyncBatchNorm):
            _check_convertible(name or "the model", module)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("the model has no BatchNorm2d to convert")
    return _replace(model, _is_plain_bn, _twin_of, {})


def revert_twin_bn(model: nn.Module) -> nn.Module:
    """The inverse of :func:`convert_twin_bn`: an ordinary network that holds the adaptive wing.

    In place like :func:`convert_twin_bn`; the frozen wing is dropped.
    """
    return _replace(model, lambda module: isinstance(module, TwinBatchNorm2d), _plain_of, {})


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
    layers = [module for module in model.modules() if isinstance(module, TwinBatchNorm2d)]
    if not layers:
        raise ValueError("the model has no two-wing batch norm; convert it with convert_twin_bn first")
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
    return any(isinstance(module, TwinBatchNorm2d) for module in model.modules())


def _is_plain_bn(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and not isinstance(module, TwinBatchNorm2d)


def _is_timm_bn_act(module: nn.Module) -> bool:
    return type(module).__name__ == "BatchNormAct2d" and hasattr(module, "drop") and hasattr(module, "act")


def _check_convertible(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.SyncBatchNorm):
        raise ValueError(f"cannot convert {name}: two-wing layers do not synchronise SyncBatchNorm statistics")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"cannot convert {name}: it has hooks, which would be lost")
    if type(module) is not nn.BatchNorm2d and not _is_timm_bn_act(module):
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
    for name, child in list(module._modules.items()):  # named_children() leaves a shared layer's second place out
        if child is None:
            continue
        new = _replace(child, wanted, build, done)
        if new is not child:
            setattr(module, name, new)
    return module


def _options(bn: nn.BatchNorm2d) -> dict:
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


def _twin_of(bn: nn.BatchNorm2d) -> TwinBatchNorm2d:
    options = {**_options(bn), "device": bn.running_mean.device, "dtype": bn.running_mean.dtype}
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


def _plain_of(twin: TwinBatchNorm2d) -> nn.BatchNorm2d:
    if isinstance(twin, TwinBatchNormAct2d):
        bn = twin.plain_type(twin.num_features, **_options(twin))
        bn.drop, bn.act = twin.drop, twin.act
    else:
        bn = nn.BatchNorm2d(twin.num_features, **_options(twin))
    _share(twin, bn)
    return bn
