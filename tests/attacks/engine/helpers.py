"""Networks, data and comparisons that the tests of the engine share."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from twins_fast import PGD
from twins_fast.attacks.engine import program
from twins_fast.attacks.engine.program import Program
from twins_fast.models import CifarResNet

STEP = {"steps": 1, "random_start": False}


def lively(model: nn.Module, seed: int = 0, size: int = 32) -> nn.Module:
    """Statistics, weights and heads as after training, and few ReLU inputs that are zero within roundoff.

    Such an input passes its gradient or not by chance, which moves all gradients before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(like, low, high):
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in norms:
            module.weight.copy_(drawn(module.weight, 0.3, 0.6))
            module.bias.copy_(drawn(module.bias, 1.5, 2) * drawn(module.bias, -0.5, 1).sign())
            module.momentum = 1.0  # the statistics are those of the batch that follows
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(drawn(module.weight, -1, 1) / module.in_features**0.5)
        if norms:
            model.train()(torch.rand(4, 3, size, size, generator=generator))
            for module in norms:
                module.momentum = 0.1
    return model.eval()


def data(images=2, size=32, classes=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(images, 3, size, size, generator=generator)
    return x, torch.randint(0, classes, (images,), generator=generator)


class Mixing(nn.Module):
    """Images see each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.conv(x)).mean((2, 3))
        return self.head(y - y.mean(0, keepdim=True))


def small(**options) -> nn.Module:
    torch.manual_seed(1)
    return lively(CifarResNet(10, width=8, blocks=(1, 1), **options))


def few_at_once(monkeypatch, cached=1):
    """Have chunks take as many images as fit into so many bytes, which are at least one."""
    monkeypatch.setattr(program, "CACHED", cached)
    monkeypatch.setattr(program, "UNCACHED", 0)


def anew(model, **options) -> PGD:
    """An attack that shares no plan with those before it."""
    attack = PGD(model, **options)
    attack.forget()
    return attack


def program_of(attack: PGD, images) -> Program:
    program = attack._program(images)
    assert isinstance(program, Program), program
    return program


def state_of(model):
    """Flags, gradients and entries, for :func:`assert_untouched`."""
    flags = [module.training for module in model.modules()]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return flags, gradients, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    flags, gradients, entries = state_of(model)
    assert flags == before[0] and gradients == before[1]
    assert all(torch.equal(entries[name], before[2][name]) for name in entries)


def loss_of(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


def assert_same_step(model, x, y, **options):
    """One step of both engines: equal but for signs of gradients that are zero within roundoff."""
    planned = PGD(model, engine="plan", **STEP, **options)(x, y)
    eager = PGD(model, engine="eager", **STEP, **options)(x, y)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    differ = planned != eager
    assert differ.float().mean() <= 1e-3
    assert (gradient.abs()[differ] <= 1e-5 * gradient.abs().max()).all()
    assert (eager != x).float().mean() > 0.5


def ten_steps(model, x, y, **options):
    """Loss after an attack by each engine from the same start."""
    losses = {}
    for kind in ("plan", "eager"):
        adversarial = PGD(model, engine=kind, generator=torch.Generator().manual_seed(3), **options)(x, y)
        losses[kind] = loss_of(model, adversarial, y)
    return losses


class Doubled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body


class Net(nn.Module):
    """Layers for the forwards below."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, padding=1)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.cfg = SimpleNamespace(scale=1.0, parts={1})
        self.number = torch.tensor(1.0)

    def top(self, x):
        return self.head(x.mean((2, 3)))


def net(forward):
    torch.manual_seed(0)
    return type("Forwarded", (Net,), {"forward": forward})()
