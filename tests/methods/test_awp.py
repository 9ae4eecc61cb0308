"""Weights that are moved to where the loss is worst, against a copy that takes a step of gradient ascent."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.graph_emulator import Device
from twins_fast import PGD, TrainingStep
from twins_fast.methods.awp import perturb_weights
from twins_fast.ops.backend import use_backend


def moved_by_hand(model, images, labels, gamma, rate=0.01):
    """The perturbed copy, as the authors make it: of a proxy's step."""
    proxy, moved = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), rate)
    (-F.cross_entropy(proxy(images), labels)).backward()
    optimizer.step()
    with torch.no_grad():
        for own, theirs, target in zip(model.parameters(), proxy.parameters(), moved.parameters(), strict=True):
            if own.dim() > 1:
                difference = theirs - own
                target.add_(gamma * own.norm() / difference.norm() * difference)
    return moved


def test_a_step_has_the_gradient_of_the_worst_weights(tiny_model, batch):
    images, labels = batch
    model = tiny_model.train()
    same = copy.deepcopy(model)
    moved = moved_by_hand(model, images, labels, 0.05)
    expected = F.cross_entropy(moved(images), labels)
    gradients = torch.autograd.grad(expected, list(moved.parameters()))
    assert expected > F.cross_entropy(copy.deepcopy(model)(images), labels)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), method="standard", awp=0.05)
    torch.testing.assert_close(step(images, labels)["loss"], expected.detach(), rtol=1e-3, atol=1e-4)
    for ours, before, slope in zip(model.parameters(), same.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours, before - 0.1 * slope, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(model.bn1.running_mean, moved.bn1.running_mean, rtol=1e-3, atol=1e-5)
    assert model.bn1.num_batches_tracked == 1


def test_weights_come_back_to_the_last_bit(tiny_model, batch):
    before = copy.deepcopy(tiny_model.state_dict())
    restore = perturb_weights(tiny_model, lambda: F.cross_entropy(tiny_model(batch[0]), batch[1]), 0.1)
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.dim() == 1), name
    restore()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


@pytest.mark.parametrize("awp", [0.05, 3e38])
def test_it_is_part_of_the_graph(monkeypatch, tiny_model, batch, awp):
    """And weights that lead nowhere are put back, too."""

    def trained():
        model = copy.deepcopy(tiny_model).train()
        attack = PGD(model, steps=2, engine="eager")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        step = TrainingStep(model, optimizer, method="trades", attack=attack, awp=awp)
        torch.manual_seed(0)
        losses = [float(step(*batch)["loss"]) for _ in range(3)]
        return losses, [*model.parameters()], step.reason

    with use_backend("torch"):
        plain = trained()
        device = Device(monkeypatch)
        captured = trained()
    assert (device.captures, device.replays, captured[2]) == (1, 2, "")
    assert captured[0] == pytest.approx(plain[0], nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(captured[1], plain[1], strict=True))
    if awp > 1:
        assert all(torch.equal(a, b) for a, b in zip(captured[1], tiny_model.parameters(), strict=True))
