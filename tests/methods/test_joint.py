"""The task at hand and the pre-training in one step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twins_fast import PGD, TrainingStep
from twins_fast.methods import Joint


def test_loss_and_gradient(tiny_model, batch):
    images, labels = batch
    torch.manual_seed(5)
    tiny_model.fc = nn.Linear(8, 5)
    source = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    model, same, pretrained = tiny_model.train(), copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    pretrained.fc_downstream = pretrained.fc

    torch.manual_seed(0)
    adversarial = PGD(same, eps=0.1, alpha=0.03, steps=2, engine="eager")(images, labels)
    attacked = PGD(pretrained, eps=0.05, alpha=0.015, steps=2, engine="eager")(*source)
    on_task = F.cross_entropy(same(adversarial), labels)
    head, same.fc_downstream = same.fc_downstream, same.fc
    expected = on_task + 0.3 * F.cross_entropy(same(attacked), source[1])
    same.fc_downstream = head
    gradients = torch.autograd.grad(expected, list(same.parameters()))

    attack = PGD(model, eps=0.1, alpha=0.03, steps=2, engine="eager")
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), method=Joint(), attack=attack)
    torch.manual_seed(0)
    torch.testing.assert_close(step(images, labels, source=source)["loss"], expected.detach())
    assert "second batch" in step.reason
    for ours, theirs, slope in zip(model.parameters(), same.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * slope, rtol=1e-4, atol=1e-6)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model.bn1, name), getattr(same.bn1, name))
    with pytest.raises(ValueError, match="'joint' needs images of the pre-training in every step"):
        step(images, labels)
