"""Two-wing batch norm layers."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.nn.guards import is_untouched
from twins_fast.ops import twin_batch_norm
from twins_fast.ops.group import Group, world_size
from twins_fast.ops.wing import Wing


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
        process_group: Group = None,
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
        if group is None or world_size(group) == 1:  # else the rows of all processes count
            self._check_statistics(x, split)
        frozen = self.main_bn
        frozen_wing = Wing(frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias)
        adaptive_wing = Wing(self.running_mean, self.running_var, self.weight, self.bias)
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
                adaptive_wing, momentum = Wing(weight=self.weight, bias=self.bias), 0.0
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
        return twin_batch_norm(x, x.shape[0], wing, Wing(), 0.0, self.eps, residual, relu)

    def __deepcopy__(self, memo: dict[int, Any]) -> TwinBatchNorm2d:
        memo[id(self.process_group)] = self.process_group  # a connection: shared, as it cannot be copied
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        text += f", wing={self.wing}" if self.wing else ""
        return text + (", synchronised" if self.process_group is not None else "")


class BatchNormAct(Protocol):
    """A batch norm of timm that holds what follows it."""

    num_features: int
    drop: nn.Module
    act: nn.Module


class TwinBatchNormAct2d(TwinBatchNorm2d):
    """Two-wing batch norm followed by ``drop`` and ``act``, as timm's ``BatchNormAct2d`` is laid out.

    ``forward(x, residual, relu)`` is ``act(drop(batch norm of x) + residual)``, then ReLU if ``relu``. An
    ``act`` that is a plain ``nn.ReLU`` or ``nn.Identity`` is computed with the batch norm unless ``drop``
    drops something.

    Args:
        plain: the layer to take the modules and (for :func:`revert_twin_bn`) the class from.
        options: as in :class:`TwinBatchNorm2d`.
    """

    drop: nn.Module
    act: nn.Module

    def __init__(self, plain: BatchNormAct, **options: Any):
        super().__init__(plain.num_features, **options)
        self.plain_type: type[Any] = type(plain)
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
        return not (isinstance(drop, (nn.Dropout, nn.Dropout2d)) and drop.training and drop.p > 0)


def _alike(residual: Tensor, x: Tensor) -> bool:
    """Whether the op takes this residual."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
