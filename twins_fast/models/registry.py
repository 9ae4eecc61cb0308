"""Networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from twins_fast.models.resnet import CifarResNet, TransferResNet
from twins_fast.validation import check_choice

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cifar-resnet18-w16": CifarResNet,
    "resnet18": partial(TransferResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(TransferResNet, Bottleneck, (3, 4, 6, 3)),
    "wide_resnet50_2": partial(TransferResNet, Bottleneck, (3, 4, 6, 3), width_per_group=128),
}


def register(name: str, build: Callable[..., nn.Module]) -> None:
    """Let recipes and :func:`build_model` use a network of your own as ``name``.

    Args:
        name: a name that is not registered yet.
        build: called as ``build(num_classes=...)``, and with ``upsample=...`` too where a recipe asks for it and
            ``build`` has that argument. The network maps images [N, 3, H, W] in [0, 1] to logits [N, num_classes];
            its downstream head is named ``fc_downstream``.

    Raises:
        ValueError: the name is registered already.
    """
    if name in ARCHITECTURES:
        raise ValueError(f"arch {name!r} is registered already")
    ARCHITECTURES[name] = build


def build_model(arch: str, num_classes: int, upsample: int | None = None) -> nn.Module:
    """A network of :data:`ARCHITECTURES` with freshly initialised weights.

    Args:
        arch: name of the architecture.
        num_classes: number of logits of the head ``fc_downstream``.
        upsample: side in pixels that images are upsampled to inside the model, for networks that do so.

    Raises:
        ValueError: an unknown name; ``upsample`` for a network that takes images as they are.
    """
    check_choice("arch", arch, ARCHITECTURES)
    build = ARCHITECTURES[arch]
    if upsample is None:
        return build(num_classes=num_classes)
    if "upsample" not in inspect.signature(build).parameters:
        raise ValueError(f"arch {arch!r} takes images as they are; upsample must be none, got {upsample!r}")
    return build(num_classes=num_classes, upsample=upsample)
