"""Networks with the input stage inside, and how a model's clamp of its images is made to pass gradients.

The networks are torchvision's, which takes as long to import as PyTorch: they come when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from twins_fast.models.clamp import clamp, pass_gradient_at_bounds

if TYPE_CHECKING:
    from twins_fast.models.registry import ARCHITECTURES, build_model, register
    from twins_fast.models.resnet import CifarResNet, TransferResNet
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("twins_fast.models.registry"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ARCHITECTURES",
    "CifarResNet",
    "TransferResNet",
    "build_model",
    "clamp",
    "pass_gradient_at_bounds",
    "register",
]
