"""Adversarial fine-tuning of robust networks with two-wing batch norm (TWINS, arXiv 2303.11135)."""

from twins_fast.attacks import PGD
from twins_fast.methods import adversarial_loss
from twins_fast.nn import TwinBatchNorm2d, convert_sync_twin_bn, convert_twin_bn, revert_twin_bn, wings
from twins_fast.nn.fuse import fuse_twin_bn, fusion_report

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "TwinBatchNorm2d",
    "adversarial_loss",
    "convert_sync_twin_bn",
    "convert_twin_bn",
    "fuse_twin_bn",
    "fusion_report",
    "revert_twin_bn",
    "wings",
]
