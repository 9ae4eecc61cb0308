"""AutoLoRa: the loss by its formula, and which parameters each of the two passes moves."""

import copy

import pytest
import torch
import torch.nn.functional as F

from twins_fast import PGD, TrainingStep
from twins_fast.methods import AutoLoRa
from twins_fast.nn.low_rank import through_branch


def with_random_branch(model):
    model = AutoLoRa(rank=2).prepare(model).train()
    for up in model.low_rank_branch.up:
        up.data.normal_(0, 0.1)
    return model


def merged(model):
    """The network with the branch added to its weights."""
    other, branch = copy.deepcopy(model), model.low_rank_branch
    for name, up, down in zip(branch.names, branch.up, branch.down, strict=True):
        weight = other.get_parameter(name)
        weight.data += (up @ down).detach().reshape(weight.shape) / 2
    return other


def test_loss_and_gradient(tiny_model, batch):
    images, labels = batch
    model = with_random_branch(tiny_model)
    body, natural, before = copy.deepcopy(model), merged(model), copy.deepcopy(model)
    attack = PGD(model, steps=2, random_start=False, engine="eager")
    adversarial = attack(images, labels)
    f, g = body(adversarial), natural(images)
    accuracy = (g.argmax(1) == labels).float().mean()
    divergence = (g.softmax(1) * (g.log_softmax(1) - f.log_softmax(1))).sum() / len(labels)
    expected = (
        (1 - accuracy) * F.cross_entropy(g, labels) + accuracy * F.cross_entropy(f, labels) + 4 * accuracy * divergence
    )
    expected.backward()
    step = TrainingStep(
        model, torch.optim.SGD(model.parameters(), 0.1), method=AutoLoRa(rank=2, kl_scale=4.0), attack=attack
    )
    torch.testing.assert_close(step(images, labels)["loss"], expected.detach())
    for name, parameter in body.named_parameters():
        if "low_rank" in name:
            continue
        slope = parameter.grad.clone()  # of the body in its own pass
        if name.startswith("fc_downstream"):
            slope += natural.get_parameter(name).grad
        moved = before.get_parameter(name).detach() - 0.1 * slope
        torch.testing.assert_close(model.get_parameter(name).detach(), moved, rtol=1e-4, atol=1e-6)
    branch = before.low_rank_branch
    for number, name in enumerate(branch.names):  # d/d(up) of the merged weight's gradient
        slope = natural.get_parameter(name).grad.reshape(branch.up[number].shape[0], -1) / 2
        up = branch.up[number] - 0.1 * slope @ branch.down[number].T
        down = branch.down[number] - 0.1 * branch.up[number].T @ slope
        torch.testing.assert_close(model.low_rank_branch.up[number], up, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.low_rank_branch.down[number], down, rtol=1e-4, atol=1e-6)


def test_a_fresh_branch_changes_nothing_and_the_stem_has_none(tiny_model, batch):
    model = AutoLoRa().prepare(copy.deepcopy(tiny_model)).eval()
    torch.testing.assert_close(through_branch(model, batch[0]), tiny_model.eval()(batch[0]))
    assert "conv1.weight" not in model.low_rank_branch.names and len(model.low_rank_branch.names) == 5
    with pytest.raises(ValueError, match="no low-rank branch: prepare it by its method"):
        through_branch(tiny_model, batch[0])
