"""Two-wing batch norm layers, the conversion of any network to and from them, and fusing what follows them."""

from twins_fast.nn.branches import AdvPropBatchNorm2d, SplitBatchNorm2d, SwitchableBatchNorm2d
from twins_fast.nn.convert import convert_sync_twin_bn, convert_twin_bn, revert_twin_bn
from twins_fast.nn.fuse import fuse_twin_bn, fusion_report
from twins_fast.nn.layers import TwinBatchNorm2d, TwinBatchNormAct2d, TwoWingBatchNorm2d
from twins_fast.nn.wings import wings

__all__ = [
    "AdvPropBatchNorm2d",
    "SplitBatchNorm2d",
    "SwitchableBatchNorm2d",
    "TwinBatchNorm2d",
    "TwinBatchNormAct2d",
    "TwoWingBatchNorm2d",
    "convert_sync_twin_bn",
    "convert_twin_bn",
    "fuse_twin_bn",
    "fusion_report",
    "revert_twin_bn",
    "wings",
]
