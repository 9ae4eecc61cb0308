"""Noise of the attack's budget in place of the attack."""

import pytest
import torch
import torch.nn.functional as F

from twins_fast.methods import Noise


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_has_the_attack_s_budget(tiny_model, norm):
    images, labels = torch.full((64, 3, 8, 8), 0.5), torch.zeros(64, dtype=torch.int64)
    uniform, gaussian = (
        Noise(distribution=kind).attack(tiny_model, norm=norm, eps=0.1, steps=5)(images, labels) - images
        for kind in ("uniform", "gaussian")
    )
    if norm == "linf":
        assert 0.09 < uniform.abs().max() <= 0.1 + 1e-7 and abs(uniform.std() - 0.1 / 3**0.5) < 2e-3
        assert abs(gaussian.std() - 0.1) < 2e-3
    else:
        assert 0.09 < uniform.flatten(1).norm(dim=1).max() <= 0.1 + 1e-6
        assert abs(gaussian.flatten(1).norm(dim=1).square().mean().sqrt() - 0.1) < 2e-3
    assert abs(uniform.mean()) < 2e-3 and abs(gaussian.mean()) < 4e-3


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_loss_and_gradient(tiny_model, batch, kind):
    images, labels = batch
    method, model = Noise(distribution=kind), tiny_model.train()
    attack = method.attack(model, eps=0.1)
    torch.manual_seed(3)
    noisy = method.perturb(attack, model, images, labels, labels.max())
    torch.manual_seed(3)
    noise = torch.empty_like(images).uniform_(-0.1, 0.1) if kind == "uniform" else 0.1 * torch.randn_like(images)
    torch.testing.assert_close(noisy, (images + noise).clamp(0, 1))
    loss = method.loss(method.forward(model, images, noisy, labels.max()), labels)
    expected = F.cross_entropy(model((images + noise).clamp(0, 1)), labels)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, model.conv1.weight)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
