"""Two-wing batch norm, the residual sum and the ReLU after it as one call, in any network that allows it."""

from twins_fast.nn.fuse.apply import Fusion, fuse_twin_bn, fusion_report

__all__ = ["Fusion", "fuse_twin_bn", "fusion_report"]
