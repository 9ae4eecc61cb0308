"""Features that stay near those of the network as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F

from twins_fast import TrainingStep, adversarial_loss
from twins_fast.methods import LwF


def by_hand(model, images):
    """Features and logits, by the layers of the tiny network."""
    x = model.relu(model.bn1(model.conv1((images - model.mean) / model.std)))
    z = model.layers(x).mean((2, 3))
    return z, model.fc_downstream(z)


def test_loss_and_gradient(tiny_model, batch):
    images, labels = batch
    model, before = tiny_model.train(), copy.deepcopy(tiny_model).eval()
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), method=LwF(feature_weight=0.02))
    for _ in range(2):  # in the second step the two networks differ by more than their batch norms' modes
        same = copy.deepcopy(model)
        features, logits = by_hand(same, images)
        with torch.no_grad():
            target, _ = by_hand(before, images)
        expected = F.cross_entropy(logits, labels) + 0.02 * (features - target).abs().sum() / len(labels)
        gradients = torch.autograd.grad(expected, list(same.parameters()))
        torch.testing.assert_close(step(images, labels)["loss"], expected.detach())
        for ours, theirs, slope in zip(model.parameters(), same.parameters(), gradients, strict=True):
            torch.testing.assert_close(ours, theirs - 0.1 * slope, rtol=1e-4, atol=1e-6)
    kept = [*step.kept.parameters()]
    assert not any(p.requires_grad for p in kept) and not step.kept.bn1.training and model.bn1.training
    assert torch.equal(step.kept.conv1.weight, before.conv1.weight)


def test_the_short_form_has_no_place_for_it(tiny_model, batch):
    with pytest.raises(ValueError, match="'lwf' keeps something of the pre-trained network: use TrainingStep"):
        adversarial_loss(tiny_model, *batch, method="lwf")
