"""Operations that PyTorch runs inside a plan."""

import gc
import weakref

import torch
from torch import nn

from tests.attacks.engine.helpers import assert_same_step, data
from twins_fast.attacks import PGD
from twins_fast.attacks.engine.executors.segment import Segment


class Rolled(nn.Module):
    """Planned layers around some that are not, of whose results a backward pass reads that of exp alone."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x).roll(1, -1).cumsum(-1).exp().roll(2, -2).cumsum(-2)
        return self.head(self.last(0.1 * x).mean((2, 3)))


def test_it_keeps_what_its_backward_pass_reads(monkeypatch):
    torch.manual_seed(0)
    model = Rolled().eval()
    x, y = data(3, 8, 5)
    assert_same_step(model, x, y)
    made, alive = {}, []
    call, backward = Segment._call, Segment.backward

    def noted(self, node, values):
        result = call(self, node, values)
        made[weakref.ref(result)] = result.grad_fn.name()
        return result

    def counted(self, *arguments):
        gc.collect()
        alive.extend(name for ref, name in made.items() if ref() is not None)
        return backward(self, *arguments)

    monkeypatch.setattr(Segment, "_call", noted)
    monkeypatch.setattr(Segment, "backward", counted)
    PGD(model, engine="plan", steps=1)(x, y)
    assert {"RollBackward0", "CumsumBackward0", "ExpBackward0"} <= set(made.values())
    assert set(alive) <= {"ExpBackward0"}
