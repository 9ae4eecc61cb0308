"""The problems of the attack benchmark: a network, a batch of images and where the attack starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, resnet50

from bench.harness import Workload
from bench.networks import PreactBlock, cifar_resnet18, preact_resnet18, wide_resnet, with_normalisation
from twins_fast.models import build_model
from twins_fast.nn.guards import random_numbers_restored

CLASSES = 10
EPS, ALPHA = 8 / 255, 2 / 255
BRANCH, OPEN, LOGITS = 0.25, 3.0, 0.1  # scale of residual branches, mean of biases before a ReLU, spread of logits
CHECKED = 32  # images whose result is compared: in eval mode they do not depend on the others


@dataclass(frozen=True)
class Attack(Workload):
    """PGD on one network; written ``NAME`` or, where it differs, ``NAME:batch=8:side=64:width=32:steps=2``."""

    batch: int
    side: int  # of the images that are attacked, in pixels
    steps: int
    width: int | None = None  # of the network; None: its own
    chunk_size: int | None = None  # of this package's attack

    @property
    def network(self) -> str:
        return self.name.split(":")[0]


@dataclass(frozen=True)
class Network:
    """``build(width)``, with its own width for None; ``batch`` is that on a CPU."""

    build: Callable[[int | None], nn.Module]
    batch: int
    side: int


def _of_width(build: Callable[..., nn.Module], width: int | None) -> nn.Module:
    return with_normalisation(build(CLASSES) if width is None else build(CLASSES, width))


def _resnet50(upsample: bool, width: int | None) -> nn.Module:
    if width is not None:
        raise ValueError("the width of a ResNet-50 is fixed here")
    return build_model("resnet50", CLASSES, 224) if upsample else with_normalisation(resnet50(num_classes=CLASSES))


NETWORKS = {
    "resnet50-224": Network(partial(_resnet50, False), 8, 224),
    "resnet50-32to224": Network(partial(_resnet50, True), 8, 32),
    "resnet18-32": Network(partial(_of_width, cifar_resnet18), 128, 32),
    "preact-resnet18-32": Network(partial(_of_width, preact_resnet18), 128, 32),
    # a batch of 128 would take minutes per attack on a CPU
    "wrn-28-10-32": Network(lambda width: with_normalisation(wide_resnet(28, width or 10, CLASSES)), 16, 32),
}
CUDA_BATCH = 128


def workload(text: str, device: str = "cpu", **defaults) -> Attack:
    """The workload that ``text`` names, as in :class:`Attack`.

    Raises:
        ValueError: an unknown network or field.
    """
    name, *settings = text.split(":")
    if name not in NETWORKS:
        raise ValueError(f"unknown workload {name!r}; choose from {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    batch = CUDA_BATCH if device == "cuda" else network.batch
    attack = Attack(text, 1, batch, network.side, defaults.pop("steps", 10), **defaults)
    known = {field.name for field in fields(Attack)} - {"name", "count"}
    for part in settings:
        key, _, value = part.partition("=")
        if key not in known or not value.isdigit():
            raise ValueError(f"{text!r}: {part!r} is not one of {', '.join(sorted(known))} with a number")
        attack = replace(attack, **{key: int(value)})
    return attack


@dataclass
class Inputs:
    """What an attack runs on.

    Attributes:
        model: in eval mode.
        images, start: float32 [N, 3, side, side] in [0, 1]; the start lies in the ball around the images.
        labels: int64 [N].
        references: filled by the checks with what results are compared with.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    start: Tensor
    references: dict = field(default_factory=dict)

    def rows(self) -> Tensor:
        """The images that are checked: the first, the last, and evenly between."""
        count = min(CHECKED, len(self.images))
        return torch.linspace(0, len(self.images) - 1, count).round().long().to(self.images.device)


def inputs(attack: Attack, device: str, seed: int = 0) -> Inputs:
    """Smooth random images with the labels that the network gives them, and a start in the ball."""
    generator = torch.Generator().manual_seed(seed)
    with random_numbers_restored():
        torch.manual_seed(seed)
        model = NETWORKS[attack.network].build(attack.width)
    settle(model, attack.side, generator)
    images = random_images(attack.batch, attack.side, generator)
    start = (images + torch.empty_like(images).uniform_(-EPS, EPS, generator=generator)).clamp_(0, 1)
    model, images, start = model.to(device), images.to(device), start.to(device)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(CHECKED)])
    return Inputs(model, images, labels, start)


def random_images(count: int, side: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(count, 3, max(side // 8, 2), max(side // 8, 2), generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    return 0.8 * F.interpolate(coarse, (side, side), mode="bilinear") + 0.2 * fine


def settle(model: nn.Module, side: int, generator: torch.Generator) -> None:
    """Give a fresh network the statistics and the smoothness of a trained one; ends in eval mode.

    Residual branches are small, most ReLUs open and logits alike: otherwise rounding alone leads two runs of ten
    steps to losses that have little in common.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    momenta = [norm.momentum for norm in norms]
    model.train()
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(OPEN, 0.3, generator=generator)
            norm.momentum = None  # a plain average over the batches
        for module in model.modules():
            last = {BasicBlock: "bn2", Bottleneck: "bn3", PreactBlock: "conv2"}.get(type(module))
            if last:
                getattr(module, last).weight.mul_(BRANCH)
        for _ in range(2):
            model(random_images(8, side, generator))
        model.eval()
        logits = model(random_images(8, side, generator))
        scale = LOGITS / logits.std(0).mean().clamp_min(1e-6)
        head.weight.mul_(scale)
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@cache
def cost(attack: Attack) -> tuple[int, int]:
    """Operations and bytes of convolutions and linear layers in one attack, forward and input gradient.

    A multiplication and an addition are two operations. Bytes: input, weights and result of each layer once per
    direction, two bytes a value, whatever type a peer computes in.
    """
    with torch.device("meta"):
        model, images = NETWORKS[attack.network].build(attack.width), torch.empty(1, 3, attack.side, attack.side)
    counted = [0, 0]

    def count(module, args, y):
        weight = module.weight.numel()
        counted[0] += 2 * attack.batch * y.numel() * weight // len(module.weight)
        counted[1] += 2 * (attack.batch * (args[0].numel() + y.numel()) + weight)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(images)
    return 2 * attack.steps * counted[0], 2 * attack.steps * counted[1]


def own_copy(model: nn.Module, layout: torch.memory_format = torch.contiguous_format, train: bool = False) -> nn.Module:
    """A copy that a peer may change; parameters have gradients only to ``train``."""
    return copy.deepcopy(model).to(memory_format=layout).requires_grad_(train)
