"""Networks with the input stage inside, and how a model's clamp of its images is made to pass gradients."""

from twins_fast.models.clamp import clamp, pass_gradient_at_bounds
from twins_fast.models.registry import ARCHITECTURES, build_model, register
from twins_fast.models.resnet import CifarResNet, TransferResNet

__all__ = [
    "ARCHITECTURES",
    "CifarResNet",
    "TransferResNet",
    "build_model",
    "clamp",
    "pass_gradient_at_bounds",
    "register",
]
