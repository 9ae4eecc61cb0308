"""Batch norms with a main and an auxiliary wing, both adaptive, laid out as in the codebases that they are from."""

from __future__ import annotations

from typing import Any

from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d, TwoWingBatchNorm2d
from twins_fast.validation import check_choice


class AuxiliaryBatchNorm2d(TwoWingBatchNorm2d):
    """What the layouts with an auxiliary wing share (AdvProp, Xie et al., arXiv 1911.09665).

    The layer's own weight, bias and running statistics are the main wing, which is the first; a child is the auxiliary
    one. Each has running statistics of its own rows. A :class:`TwoWingBatchNorm2d` otherwise, without cumulative
    averages (``momentum=None``), which would be of as many batches as either wing has seen.
    """

    wing_names = ("main", "auxiliary")
    both_adaptive = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        if self.momentum is None:
            raise ValueError("two adaptive wings need a momentum, got None")


class AdvPropBatchNorm2d(AuxiliaryBatchNorm2d):
    """``MixBatchNorm2d`` of AdvProp in PyTorch: the child is ``aux_bn``.

    The attribute ``batch_type``, ``"clean"`` (at first), ``"adv"`` or ``"mix"``, says which wing takes the rows, in
    train and in eval mode.
    """

    child_name = "aux_bn"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.batch_type = "clean"

    def usual_wing(self) -> str:
        check_choice("batch_type", self.batch_type, ("clean", "adv", "mix"))
        return {"clean": "main", "adv": "auxiliary", "mix": "mix"}[self.batch_type]


class SplitBatchNorm2d(AuxiliaryBatchNorm2d):
    """timm's layer of that name with two splits: the child is ``aux_bn.0``. ``mix`` in train, ``main`` in eval mode."""

    child_name = "aux_bn"

    def _add_child(self, norm: nn.BatchNorm2d) -> None:
        self.aux_bn = nn.ModuleList([norm])

    @property
    def child_wing(self) -> nn.BatchNorm2d:
        norm: nn.BatchNorm2d = self.aux_bn[0]  # type: ignore[assignment]
        return norm

    def usual_wing(self) -> str:
        return "mix" if self.training else "main"


class SwitchableBatchNorm2d(AuxiliaryBatchNorm2d):
    """The layer of that name in ARES: the child is ``bn_adv``.

    The attribute ``bn_mode``, ``"clean"`` (at first) or ``"adv"``, says which wing takes all rows in train mode; in
    eval mode it is the main one.
    """

    child_name = "bn_adv"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.bn_mode = "clean"

    def usual_wing(self) -> str:
        check_choice("bn_mode", self.bn_mode, ("clean", "adv"))
        return "auxiliary" if self.training and self.bn_mode == "adv" else "main"


LAYOUTS: dict[str, type[TwoWingBatchNorm2d]] = {
    "twins": TwinBatchNorm2d,
    "advprop": AdvPropBatchNorm2d,
    "timm": SplitBatchNorm2d,
    "ares": SwitchableBatchNorm2d,
}
