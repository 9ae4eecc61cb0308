"""Kernels that compute something else than PyTorch do not attack anybody."""

import pytest
import torch
from torch import nn

from tests.attacks.engine.helpers import STEP, data, lively
from twins_fast import PGD
from twins_fast.attacks.engine import cache
from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.torch import TorchExecutor


class Kinds(nn.Module):
    """A step of every kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.norm = nn.BatchNorm2d(8)
        self.branch, self.both = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.layer_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x / 2)
        x = self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = (self.branch(nn.functional.silu(self.norm(x).relu())) + x).relu() / 256
        x = self.both(torch.cat([x, x * self.branch(x).mean((2, 3), keepdim=True)], 1).relu()).relu()
        return self.head((x + self.norm(x).relu()).mean((2, 3)))


def last_image(role):
    def damage(tensors):
        tensors[role][-1].mul_(1.3)

    return damage


def ones(role):
    def damage(tensors):
        tensors[role].fill_(1)

    return damage


DAMAGES = {
    "conv": last_image("y"),
    "conv with the wrong mask": ones("mask"),
    "affine": last_image("y"),
    "max_pool": last_image("y"),
    "avg_pool": last_image("y"),
    "pointwise": last_image("y"),
    "activation": last_image("y"),
    "activation with the wrong slope": last_image("slope"),
    "layer_norm": last_image("y"),
    "layer_norm with wrong moments": last_image("moments"),
    "gather": last_image("y"),
    "gather with the wrong mask": ones("mask"),
    "product": last_image("y"),
    "gather_backward": last_image("dx"),
    "product_backward": last_image("dx"),
    "conv_backward": last_image("dx"),
    "affine_backward": last_image("dx"),
    "activation_backward": last_image("dx"),
    "layer_norm_backward": last_image("dx"),
    "max_pool_backward": last_image("dx"),
    "avg_pool_backward": last_image("dx"),
    "finish": last_image("y"),
}


def executor(name, damage):
    """Plain PyTorch but for what becomes of one kind of step; ``damage`` None: the step is left out."""

    def bind(self, state, tensors):
        right = getattr(TorchExecutor, name)(self, state, tensors)

        def run():
            right()
            damage(tensors)

        damaged = name not in ("conv", "gather") or tensors["mask"] is not None
        return (lambda: None) if damage is None else run if damaged else right

    return type("Wrong", (TorchExecutor,), {name: bind, "name": "wrong kernels"})


def reason(monkeypatch, kind, amp_dtype=None):
    torch.manual_seed(0)
    model, (x, y) = lively(Kinds(), size=8), data(5, 8)
    monkeypatch.setattr(cache, "executor_for", kind)
    attack = PGD(model, amp_dtype=amp_dtype, **STEP)
    adversarial, report = attack(x, y), attack.explain(x)
    if report.engine == "eager":
        assert torch.equal(adversarial, PGD(model, engine="eager", amp_dtype=amp_dtype, **STEP)(x, y))
    return report.reason


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_right_kernels_pass(amp_dtype, monkeypatch):
    assert reason(monkeypatch, type("Right", (TorchExecutor,), {}), amp_dtype) == ""


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("wrong", DAMAGES)
def test_a_wrong_kernel_is_named(wrong, amp_dtype, monkeypatch):
    operation = wrong.partition(" ")[0]
    said = reason(monkeypatch, executor(operation, DAMAGES[wrong]), amp_dtype)
    assert said.endswith("by wrong kernels gives other results than PyTorch")
    assert f": {operation}" in said or wrong != operation  # a wrong mask shows in the backward pass


@pytest.mark.parametrize("operation", [name for name in DAMAGES if " " not in name])
def test_a_kernel_that_writes_nothing_is_named(operation, monkeypatch):
    assert f": {operation} by wrong kernels" in reason(monkeypatch, executor(operation, None))


@pytest.mark.parametrize("method", ["prepare", "gradient", "sign_step"])
def test_a_wrong_step_of_the_pixels_is_seen(method, monkeypatch):
    class WrongInput(Input):
        pass

    def wrong(self, x, *arguments):
        result = getattr(Input, method)(self, x, *arguments)
        (x if method == "sign_step" else arguments[0] if method == "prepare" else result)[-1].add_(0.1)
        return result

    setattr(WrongInput, method, wrong)
    kind = type("Wrong", (TorchExecutor,), {"input": lambda self, *arguments: WrongInput(*arguments)})
    said = reason(monkeypatch, kind)
    assert said.startswith("normalisation of the images" if method == "prepare" else "step of the pixels")
