"""Networks with other activations than ReLU: planned without PyTorch's autograd, and equal to eager."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import anew, assert_same_step, data, lively
from twins_fast import PGD, accelerate
from twins_fast.models.clamp import clamp


class Body(nn.Module):
    """An activation after a batch norm, a sum, a pooling and in the head."""

    def __init__(self, act):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.next = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 10)
        self.act = act

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(x + self.branch(x).relu())
        x = self.act(F.max_pool2d(self.next(x), 2))
        return self.head(self.act(self.hidden(x.mean((2, 3)))))


ACTS = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: x * torch.sigmoid(x),
    "swish the other way": lambda x: x.sigmoid() * x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "elu of alpha": lambda x: F.elu(x, 0.7),
    "mish": F.mish,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp from below": lambda x: x.clamp(min=-0.5),
    "our clamp": lambda x: clamp(x, 0, 1),
}


def network(name):
    torch.manual_seed(0)
    return lively(Body(ACTS[name]), size=16)


@pytest.mark.parametrize("name", ACTS)
def test_activations_are_planned_and_equal_eager(name):
    model, (x, y) = network(name), data(5, 16)
    layers = anew(model, engine="plan").explain(x).layers
    assert not [layer["op"] for layer in layers if "autograd" in layer["runs"]]
    assert_same_step(model, x, y)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits, expected = accelerate(model)(leaf), model(other)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    (gradient,), (wanted,) = (torch.autograd.grad(z[:, 2].sum(), v) for z, v in ((logits, leaf), (expected, other)))
    assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", ["silu", "gelu", "hardswish", "mish", "relu6"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(name, dtype):
    """About as near to float32 as PyTorch's own."""
    model, (x, y) = network(name), data(5, 16)

    def gradient(network):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(leaf).float(), y), leaf)[0]

    wanted = gradient(model)
    with torch.autocast("cpu", dtype):
        theirs = gradient(model)
    error, usual = ((g - wanted).norm() / wanted.norm() for g in (gradient(accelerate(model, dtype)), theirs))
    assert error <= 1.6 * usual + 0.03


@pytest.mark.parametrize("act", [lambda x: F.elu(x.exp()), lambda x: F.softplus(x), lambda x: x * x.sigmoid() * x])
def test_what_is_none_of_them_is_left_to_pytorch(act):
    torch.manual_seed(0)
    model, (x, y) = Body(act).eval(), data(3, 16)
    assert PGD(model).explain(x).engine == "plan"
    planned, eager = (PGD(model, steps=1, random_start=False, engine=engine)(x, y) for engine in ("plan", "eager"))
    assert (planned != eager).float().mean() < 5e-3
