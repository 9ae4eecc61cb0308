"""The clamp of the images: its derivative, and what is said and done about other models' clamps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twins_fast import PGD
from twins_fast.models import CifarResNet, clamp, pass_gradient_at_bounds
from twins_fast.models.clamp import NOTE, torch_passes_at_bounds

INF = float("inf")
CLAMPS = {
    "clamp": lambda x: torch.clamp(x, 0, 1),
    "method with names": lambda x: x.clamp(max=1.0, min=0.0),
    "clip": lambda x: x.clip(0, 1),
    "two sides apart": lambda x: x.clamp(min=0).clamp(max=1),
    "in place": lambda x: x.clone().clamp_(0, 1),
    "hardtanh": lambda x: F.hardtanh(x, 0, 1),
    "module": nn.Hardtanh(0.0, 1.0),
}


class Clamped(nn.Module):
    """A network that clamps its images in its own way."""

    def __init__(self, clamp):
        super().__init__()
        torch.manual_seed(0)
        self.body = CifarResNet(3, width=4, blocks=(1,))
        self.clamp = clamp

    def forward(self, images):
        return self.body(self.clamp(images))


def black_and_white():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 8, generator=generator).round(), torch.tensor([0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_derivative(dtype):
    x = torch.tensor([-INF, -0.5, 0.0, 0.25, 1.0, 1.5, INF, float("nan")], dtype=dtype, requires_grad=True)
    y = clamp(x)
    assert torch.equal(y.nan_to_num(7), x.detach().clamp(0, 1).nan_to_num(7)) and y.dtype == dtype
    (gradient,) = torch.autograd.grad(y[:-1].sum(), x)
    assert gradient.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_second_derivatives_and_function_transforms():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    jacobian = torch.func.vmap(torch.func.grad(lambda v: clamp(v) ** 3))(x)
    assert torch.equal(jacobian, torch.tensor([0.0, 0.0, 0.75, 3.0, 0.0]))
    assert torch.autograd.gradgradcheck(clamp, torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("engine", ["eager", "plan"])
def test_own_networks_move_pixels_at_the_bounds(engine):
    x, y = black_and_white()
    model = Clamped(nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = PGD(model, steps=1, random_start=False, engine=engine)(x, y) != x
    assert 0.4 < moved.float().mean() < 0.6  # those whose gradient points inwards
    assert NOTE not in str(PGD(model, engine=engine).explain(x))


@pytest.mark.parametrize("kind", CLAMPS)
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_clamp_that_blocks_is_told_once_and_can_be_replaced(kind, engine):
    x, y = black_and_white()
    model = Clamped(CLAMPS[kind])
    blocks = kind in ("hardtanh", "module") or not torch_passes_at_bounds()
    attack = PGD(model, steps=1, random_start=False, engine=engine)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(attack(x, y), x) == blocks
    told = [str(message.message) for message in messages]
    assert [text for text in told if "eager mode" not in text] == [NOTE] * blocks
    assert (NOTE in str(attack.explain(x))) == blocks

    passing = pass_gradient_at_bounds(model)
    attack = PGD(passing, steps=1, random_start=False, engine=engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*in eager mode")
        moved = attack(x, y)
    assert 0.4 < (moved != x).float().mean() < 0.6
    assert torch.equal(moved, PGD(model.body, steps=1, random_start=False, engine=engine)(x, y))
    assert NOTE not in str(attack.explain(x))
    assert torch.equal(passing(x * 3 - 1), model(x * 3 - 1))


def test_clamps_of_other_values_stay():
    class Inner(nn.Module):
        def forward(self, x):
            wide = torch.cat([x, x], 1)
            return x.clamp(-1, 1).sum() + wide.clamp(0, 1).sum() + x.flatten(1).clamp(0, 1).sum()

    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    gradients = [torch.autograd.grad(model(x), x)[0] for model in (Inner(), pass_gradient_at_bounds(Inner()))]
    assert torch.equal(*gradients)


def test_parameters_and_modes_are_the_models():
    model = Clamped(torch.relu).train()
    passing = pass_gradient_at_bounds(model)
    assert all(a is b for a, b in zip(passing.parameters(), model.parameters(), strict=True))
    passing.eval()
    assert not any(module.training for module in model.modules())
