"""Operations that PyTorch runs inside a plan."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models import SwinTransformer

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


class Plain(nn.Module):
    """Sums, shapes and a linear layer of a pass around what is read."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 6), nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.mix(x.roll(1, -1).transpose(2, 3)).cumsum(-1) + torch.nn.functional.pad(x, (1, 0))[..., 1:]
        return self.head(y.tanh().mean((2, 3)))


def swin():
    options = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    return SwinTransformer(**options, num_classes=5)


def range_of(tensor):
    """First and last byte."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size() - 1


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("network, least", [(Rolled, 0), (Plain, 3), (swin, 4)])
def test_what_is_unread_is_not_saved(network, least, half, monkeypatch):
    torch.manual_seed(0)
    model = network().eval()
    x, y = data(3, 8, 5)
    if half is None:
        assert_same_step(model, x, y)
    forward, unread = Segment.forward, []

    def watched(self, rows, tensors, outputs):
        saved = []
        with saved_tensors_hooks(lambda t: saved.append(range_of(t)) or t, lambda t: t):
            forward(self, rows, tensors, outputs)
        for value, tensor in zip(self.stage.inputs, tensors, strict=True):
            if value in self.stage.options["unread"]:
                low, high = range_of(tensor)
                assert not any(first <= high and low <= last for first, last in saved)
                unread.append(value)

    monkeypatch.setattr(Segment, "forward", watched)
    attack = PGD(model, engine="plan", steps=1, amp_dtype=half)
    attack(x, y)
    unread.clear()
    attack(x, y)
    assert len(set(unread)) >= least
