"""What a recipe describes, as PyTorch objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from twins_fast.attacks import PGD
from twins_fast.checkpoints import adopt_source_head, load_pretrained, read_state_dict
from twins_fast.models import build_model
from twins_fast.train import assets
from twins_fast.train.recipe import AMP, Network, Recipe

AMP_DTYPES = dict(zip(AMP, (None, torch.bfloat16, torch.float16), strict=True))


def make_network(network: Network, num_classes: int, seed: int = 0, source_head: bool = False) -> nn.Module:
    """The network before its method prepares it: a pre-trained body, if there is one, and a fresh head.

    Args:
        network: of a recipe.
        num_classes: logits of the fresh head.
        seed: of all random weights.
        source_head: whether the head of the pre-training is kept, as ``fc``.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another network.
        ValueError: the network cannot upsample its images.
    """
    torch.manual_seed(seed)
    model = build_model(network.arch, num_classes, network.upsample)
    if network.checkpoint not in ("", "none"):
        path = assets.NETWORK if network.checkpoint == "embedded" else network.checkpoint
        state = read_state_dict(path)
        if source_head:
            adopt_source_head(model, state)
        load_pretrained(model, state)
    return model.to(memory_format=torch.channels_last) if network.channels_last else model


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    """SGD on the parameters that the method trains; on a GPU fused, so that a training step can be captured."""
    options = recipe.optimizer
    parameters = recipe.method.parameters(model)
    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        fused=True if all(p.is_cuda for p in parameters) else None,
    )


def mix(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What makes of a batch one of mixed images, whose labels are probabilities; by default nothing."""
    kind = {"none": None, "mixup": v2.MixUp, "cutmix": v2.CutMix}[recipe.regularisation.mix]
    if kind is None:
        return lambda images, labels: (images, labels)
    return kind(alpha=recipe.regularisation.mix_alpha, num_classes=num_classes)


def training_attack(recipe: Recipe, model: nn.Module):
    """The method's adversary, or None."""
    return recipe.method.attack(model, **dataclasses.asdict(recipe.attack))


def evaluation_attack(recipe: Recipe, model: nn.Module) -> PGD:
    """The attack of the published evaluation: no random start."""
    options = dataclasses.asdict(recipe.attack) | {"alpha": recipe.evaluation.alpha, "steps": recipe.evaluation.steps}
    return PGD(model, random_start=False, **options)
