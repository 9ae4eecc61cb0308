"""Backward passes of a model's own: which are derivatives, and so may be planned."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

from tests.attacks.engine.helpers import anew, assert_same_step, data, lively
from twins_fast import PGD
from twins_fast.attacks.engine.derivatives import is_derivative


class Swish(Function):
    """As RobustBench's WideResNets have it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s * (1 + x * (1 - s)))


class Scaled(Function):
    """With a number, and a context of its own."""

    @staticmethod
    def forward(x, factor):
        return x.tanh() * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.factor * (1 - x.tanh().square()), None


def backward_of(forward, backward):
    class Made(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return backward(ctx.saved_tensors[0], g)

    return Made


def in_place(x):
    return x.mul_(2)


OTHERS = {
    "straight through": backward_of(torch.round, lambda x, g: g),
    "reversed": backward_of(torch.clone, lambda x, g: -g),
    "clipped": backward_of(torch.clone, lambda x, g: g.clamp(-1, 1)),
    "clipped far out": backward_of(torch.clone, lambda x, g: g.clamp(-1e4, 1e4)),
    "scaled a little": backward_of(torch.tanh, lambda x, g: g * (1 - x.tanh().square()) * 1.0001),
    "wrong for large values": backward_of(
        lambda x: x * x.sigmoid(), lambda x, g: g * torch.where(x > 500, 0.0, x.sigmoid() * (1 + x * (1 - x.sigmoid())))
    ),
    "wrong at zero": backward_of(torch.relu, lambda x, g: g * (x >= 0)),
    "not element-wise": backward_of(lambda x: x - x.mean(), lambda x, g: g - g.mean()),
    "another shape": backward_of(lambda x: x.sum(), lambda x, g: g.expand_as(x)),
    "random": backward_of(lambda x: x * torch.rand_like(x), lambda x, g: g * 0.5),
    "in place": backward_of(in_place, lambda x, g: 2 * g),
    "fails": backward_of(lambda x: x.nothing, lambda x, g: g),
}


@pytest.mark.parametrize("function, args", [(Swish, ()), (Scaled, (3.0,))])
def test_derivatives_are_recognised(function, args):
    assert is_derivative(function, (torch.zeros(2, 3), *args))


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name):
    assert not is_derivative(OTHERS[name], (torch.zeros(2, 3),))
    assert not is_derivative(Swish, (torch.zeros(2), torch.zeros(2)))
    assert not is_derivative(Swish, (torch.zeros(2, dtype=torch.int64),))


class Body(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 10)
        self.act = act

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        return self.head(self.act(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("act", [Swish.apply, lambda x: Scaled.apply(x, 2.0)])
def test_networks_with_derivatives_are_planned(act):
    torch.manual_seed(0)
    model, (x, y) = lively(Body(act)), data(4)
    assert anew(model).explain(x).engine == "plan"
    assert_same_step(model, x, y)


@pytest.mark.parametrize("name", ["straight through", "clipped", "reversed"])
def test_networks_with_others_stay_eager(name):
    model = Body(lambda x: OTHERS[name].apply(Swish.apply(x))).eval()
    report = PGD(model).explain(data(2)[0])
    assert report.engine == "eager" and "a backward pass of its own" in report.reason
