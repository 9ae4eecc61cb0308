"""Two-wing batch norm layers."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.nn.guards import is_untouched
from twins_fast.ops import twin_batch_norm
from twins_fast.ops.group import Group, world_size
from twins_fast.ops.wing import Wing


class TwoWingBatchNorm2d(nn.BatchNorm2d):
    """What batch norms with two wings have in common: the layer itself is one wing, a child the other.

    In ``mix`` mode the first ``N // 2`` rows of a batch go through the first wing and the others through the second;
    else all rows go through one wing, by its name. What ``train()`` and ``eval()`` mean each layout says for itself,
    unless :func:`wings` says otherwise. As in any batch norm, ``training`` alone decides whether an adaptive wing uses
    (and updates) batch statistics.

    Args:
        num_features: channels C.
        eps: added to the variance, both wings.
        momentum: of the running statistics; ``None`` for a cumulative average.
        affine: whether each wing has its own weight and bias.
        track_running_stats: whether *adaptive* wings keep running statistics.
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

    wing_names: ClassVar[tuple[str, str]]  # of the first wing and the second
    child_name: ClassVar[str]
    both_adaptive: ClassVar[bool]  # and the layer itself is the first wing; or the second, which alone is adaptive

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
        tracks = track_running_stats or not self.both_adaptive  # a frozen wing has nothing else
        self._add_child(nn.BatchNorm2d(num_features, eps, momentum, affine, tracks, device=device, dtype=dtype))
        self.wing: str | None = None  # set by wings()
        self.process_group = process_group

    def _add_child(self, norm: nn.BatchNorm2d) -> None:
        setattr(self, self.child_name, norm)

    @property
    def child_wing(self) -> nn.BatchNorm2d:
        """The wing that is a child."""
        norm: nn.BatchNorm2d = getattr(self, self.child_name)
        return norm

    def usual_wing(self) -> str:
        """``"mix"`` or the name of the wing that takes all rows, if :func:`wings` does not say."""
        raise NotImplementedError

    def chosen_wing(self) -> str:
        """The same, if it does."""
        return self.wing or self.usual_wing()

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Batch norm of ``x``, then ``+ residual``, then ReLU if ``relu``: one pass over memory where a kernel runs.

        A residual that is not like ``x`` (broadcast, other dtype) is added by PyTorch.
        """
        if residual is not None and not _alike(residual, x):
            y = TwoWingBatchNorm2d.forward(self, x) + residual
            return F.relu(y) if relu else y
        self._check_input_dim(x)
        rows = x.shape[0]
        wing = self.chosen_wing()
        split = {"mix": rows // 2, self.wing_names[0]: rows, self.wing_names[1]: 0}[wing]
        takes_batch_statistics = self.training and (self.both_adaptive or wing != self.wing_names[0])
        group = self.process_group if takes_batch_statistics else None
        if group is None or world_size(group) == 1:  # else the rows of all processes count
            self._check_statistics(x, wing, split)
        first, second = self._halves()
        vectors = [Wing(norm.running_mean, norm.running_var, norm.weight, norm.bias) for norm in (first, second)]
        if not self.training:
            if split in (0, rows):
                return self._normalize(x, vectors[0] if split == rows else vectors[1], residual, relu)
            y = torch.cat([self._normalize(x[:split], vectors[0]), self._normalize(x[split:], vectors[1])])
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        if not takes_batch_statistics:
            y = self._normalize(x, vectors[0], residual, relu)
        else:
            for i, norm in enumerate((first, second)):
                adaptive = self.both_adaptive or norm is second
                if adaptive and not norm.track_running_stats:  # switched off later: no update, as in nn.BatchNorm2d
                    vectors[i] = Wing(weight=norm.weight, bias=norm.bias)
            momentum = self.momentum
            if momentum is None:  # cumulative average
                tracked = self.num_batches_tracked if self.track_running_stats else None
                momentum = 0.0 if tracked is None else 1.0 / (float(tracked) + 1.0)
            wings = vectors[0], vectors[1]
            y = twin_batch_norm(x, split, *wings, momentum, self.eps, residual, relu, group, self.both_adaptive)
        if split > 0:  # of a frozen wing the published code counts them, too; nothing reads it
            _count_batch(first)
        if wing != self.wing_names[0]:
            _count_batch(second)
        return y

    def _halves(self) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
        """The first wing and the second."""
        return (self, self.child_wing) if self.both_adaptive else (self.child_wing, self)

    def _check_statistics(self, x: Tensor, wing: str, split: int) -> None:
        """Refuse, before anything is written, what an adaptive wing has no statistics for."""
        halves = [*zip(self.wing_names, self._halves(), (split, x.shape[0] - split), strict=True)]
        for name, norm, rows in halves if self.both_adaptive else halves[1:]:
            if wing not in ("mix", name):
                continue
            if not self.training and norm.running_mean is None:
                kind = type(self).__name__
                raise ValueError(f"{kind} in eval mode needs running statistics, but track_running_stats=False")
            if self.training and rows * x.shape[2] * x.shape[3] < 2:
                raise ValueError(
                    f"batch statistics need at least 2 values per channel, but the {name} wing got {rows} row(s) "
                    f"of {x.shape[2]} x {x.shape[3]} pixels from a batch of {x.shape[0]}"
                )

    def _normalize(self, x: Tensor, wing: Wing, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """All of ``x`` with the running statistics of ``wing``."""
        if x.numel() == 0 or (residual is None and not relu):
            return F.batch_norm(x, *wing, training=False, eps=self.eps)
        return twin_batch_norm(x, x.shape[0], wing, Wing(), 0.0, self.eps, residual, relu)

    def __deepcopy__(self, memo: dict[int, Any]) -> TwoWingBatchNorm2d:
        memo[id(self.process_group)] = self.process_group  # a connection: shared, as it cannot be copied
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        text += f", wing={self.wing}" if self.wing else ""
        return text + (", synchronised" if self.process_group is not None else "")


class TwinBatchNorm2d(TwoWingBatchNorm2d):
    """Batch norm with a frozen and an adaptive wing (TWINS, arXiv 2303.11135).

    The layer's own weight, bias and running statistics are the adaptive wing, which is the second; the child
    ``main_bn`` is the frozen wing, which always has running statistics, and they never change. Both wings' weights and
    biases are trained. The state dict is that of the published code. ``train()`` means ``mix`` and ``eval()``
    ``adaptive``, unless :func:`wings` says otherwise. Arguments are those of :class:`TwoWingBatchNorm2d`.
    """

    wing_names = ("frozen", "adaptive")
    child_name = "main_bn"
    both_adaptive = False

    main_bn: nn.BatchNorm2d

    def usual_wing(self) -> str:
        return "mix" if self.training else "adaptive"


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


def _count_batch(norm: nn.BatchNorm2d) -> None:
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
