"""MART against the definition, written with probabilities and loops."""

import pytest
import torch
import torch.nn.functional as F

from twins_fast import TrainingStep, adversarial_loss, convert_twin_bn
from twins_fast.methods import MART, Logits, TwinsMART


def by_hand(adversarial, clean, labels, weight, rows):
    """Of some rows of a batch of ``rows``."""
    boosted, divergence = [], []
    for z_adversarial, z_clean, label in zip(adversarial, clean, labels.tolist(), strict=True):
        p, q = z_adversarial.softmax(0), z_clean.softmax(0)
        other = torch.cat([p[:label], p[label + 1 :]]).max()
        boosted.append(-p[label].log() - (1.0001 - other).log())
        divergence.append((q * (q / p).log()).sum() * (1 - q[label]))
    return sum(boosted) / len(boosted) + weight * sum(divergence) / rows


@pytest.mark.parametrize("method", [MART(kl_weight=3.0), TwinsMART(kl_weight=3.0, frozen_weight=0.4)])
def test_loss_and_gradient(method):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (7,), generator=generator)
    adversarial, clean = (torch.randn(7, 4, generator=generator).double().mul(3).requires_grad_() for _ in range(2))
    loss = method.loss(Logits(adversarial, clean), labels)
    if method.wings == 1:
        expected = by_hand(adversarial, clean, labels, 3.0, 7)
    else:
        frozen, adaptive = (
            by_hand(adversarial[part], clean[part], labels[part], 3.0, 7) for part in (slice(0, 3), slice(3, 7))
        )
        expected = 0.4 * frozen + adaptive
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (adversarial, clean)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_confident_network_has_a_finite_loss():
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = MART().loss(Logits(logits, logits.detach()), torch.tensor([1]))
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_labels_that_are_probabilities_are_refused(tiny_model, batch):
    model, soft = convert_twin_bn(tiny_model).train(), F.one_hot(batch[1], 3).float()
    with pytest.raises(ValueError, match="'twins-mart' needs one class for each image: it cannot have labels that are"):
        adversarial_loss(model, batch[0], soft, method="twins-mart")
    with pytest.raises(ValueError, match="'mart' needs one class for each image: it cannot have label smoothing"):
        TrainingStep(tiny_model, None, method="mart", label_smoothing=0.1)
