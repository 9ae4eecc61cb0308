"""Each difference of docs/drop-in.md, with what stands around it in the code that it is for, runs and attacks."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import twins_fast
from bench.drop_in import CASES, differences
from bench.third_party import library
from tests.compat.problem import problem
from tests.compat.test_wrappers import Network
from tests.nn.test_branches import MixBatchNorm2d
from twins_fast.nn.wings import two_wing_layers

BLOCKS = differences()


AUXILIARY = ("AdvProp", "timm's split batch norm", "ARES")


def surroundings(monkeypatch):
    """The names that the code around has."""
    model, images, labels = problem()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    dataset = SimpleNamespace(mean=mean, std=std)
    names = {
        "twins_fast": twins_fast,
        "model": model,
        "rmodel": model,
        "dataset": dataset,
        "criterion": nn.CrossEntropyLoss(),
    }
    names |= dict.fromkeys(("images", "x_natural", "X", "x"), images) | dict.fromkeys(("labels", "y"), labels)
    names |= {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "attack_iters": 2, "restarts": 1, "norm": "l_inf"}
    names |= {"proxy": copy.deepcopy(model), "proxy_optim": None, "epsilon": 8 / 255, "alpha": 2 / 255}
    names |= {"resnet50": partial(resnet18, num_classes=10), "MixBatchNorm2d": MixBatchNorm2d, "torch": torch}
    names |= {"to_mix_status": lambda module: setattr(module, "batch_type", "mix")}

    def make_and_restore_model(arch, dataset):
        return library("robustness.attacker").AttackerModel(Network(model), dataset), None

    def trainer(rmodel, eps, alpha, steps):
        return SimpleNamespace(atk=library("torchattacks").PGD(rmodel, eps, alpha, steps))

    return names | {"make_and_restore_model": make_and_restore_model, "AT": trainer}


def in_normalised_space(names):
    """As fast_adversarial has it."""
    mean, std = (part.view(3, 1, 1) for part in (names["dataset"].mean, names["dataset"].std))
    return names | {"X": (names["X"] - mean) / std, "epsilon": 8 / 255 / std, "alpha": 2 / 255 / std}


def test_every_codebase_has_one():
    assert {title for title, _ in BLOCKS} == {case.title for case in CASES.values()} | set(AUXILIARY)
    assert len(BLOCKS) == 13 and {title for title, _ in BLOCKS} >= {"torchattacks", "MAIR", "The published TWINS code"}


@pytest.mark.parametrize("title, number", BLOCKS)
def test_it_runs(monkeypatch, title, number):
    lines = BLOCKS[title, number].splitlines()
    assert sum(line[0] == "+" for line in lines) <= 3 and all(line[0] in "+- " for line in lines)
    names = surroundings(monkeypatch)
    if title.startswith("fast_adversarial") and number == 0:
        names = in_normalised_space(names)
    if title in AUXILIARY:
        names["model"].train()
        names["adversarial"] = names["images"].flip(3)
    exec("\n".join(line[1:] for line in lines if line[0] != "-"), names)
    images = names["X"]
    if title == "MAIR":
        names["adversarial"] = names["trainer"].atk(images, names["y"])
    if title == "The published TWINS code":
        attack = names["FastGradientSignUntargeted"](names["model"], 8 / 255, 2 / 255, 0, 1, 2)
        names["adversarial"] = attack.perturb(images, names["y"])
        layer = names["MixBatchNorm2d"](3)
        assert layer.apply(names["to_mix_status"])(images).shape == images.shape
    if title in AUXILIARY:
        names["loss"].backward()
        layers = two_wing_layers(names["model"])
        assert layers and all(layer.child_wing.weight.grad is not None for layer in layers)
        assert all(layer.child_wing.running_mean.any() for layer in layers)
        return
    if (title, number) == ("TRADES, MART, AWP", 0):
        assert names["loss"].item() > 0 and names["model"].fc_downstream.weight.grad is not None
        return
    found = names.get("adversarial", names.get("x_adv", images + names["delta"] if "delta" in names else None))
    moved = (found - images).abs()
    assert moved.amax() > 1 / 255 and moved.amax() < 0.2
