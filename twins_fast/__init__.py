"""Adversarial fine-tuning of robust networks with two-wing batch norm (TWINS, arXiv 2303.11135)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twins_fast.attacks import PGD, accelerate
    from twins_fast.methods import TrainingStep, adversarial_loss
    from twins_fast.nn import TwinBatchNorm2d, convert_sync_twin_bn, convert_twin_bn, revert_twin_bn, wings
    from twins_fast.nn.fuse import fuse_twin_bn, fusion_report

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "TrainingStep",
    "TwinBatchNorm2d",
    "accelerate",
    "adversarial_loss",
    "convert_sync_twin_bn",
    "convert_twin_bn",
    "fuse_twin_bn",
    "fusion_report",
    "revert_twin_bn",
    "wings",
]
_HOMES = {
    "PGD": "attacks",
    "accelerate": "attacks",
    "TrainingStep": "methods",
    "adversarial_loss": "methods",
    "fuse_twin_bn": "nn.fuse",
    "fusion_report": "nn.fuse",
}
_PACKAGES = ("attacks", "checkpoints", "compat", "evaluation", "kernels", "methods", "models", "nn", "ops", "train")


def __getattr__(name: str) -> Any:
    """Import PyTorch only where something is used: the command line prints its help without."""
    if name in __all__:
        value = getattr(import_module(f"twins_fast.{_HOMES.get(name, 'nn')}"), name)
    elif name in _PACKAGES:
        value = import_module(f"twins_fast.{name}")
    else:
        raise AttributeError(f"module 'twins_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
