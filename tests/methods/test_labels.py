"""Label smoothing against the definition of PyTorch, and where it belongs: in the loss, not in the attack."""

import pytest
import torch
import torch.nn.functional as F

from twins_fast import PGD, TrainingStep
from twins_fast.methods.labels import smoothed


def test_smoothed_labels_give_pytorch_s_loss():
    logits, labels = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    loss = F.cross_entropy(logits, smoothed(labels, 5, 0.2))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))
    soft = torch.rand(6, 5).softmax(1)
    torch.testing.assert_close(smoothed(soft, 5, 0.2), 0.8 * soft + 0.04)
    assert smoothed(labels, 5, 0.0) is labels


@pytest.mark.parametrize("method", ["at", "trades"])
def test_a_step_smooths_the_labels_of_the_loss_alone(tiny_model, batch, method):
    seen = []

    class Attack(PGD):
        def __call__(self, images, labels, x_init=None):
            seen.append(labels)
            return (images + 0.02).clamp(0, 1)

    model = tiny_model.train()
    images, labels = batch
    adversarial = model((images + 0.02).clamp(0, 1))
    step = TrainingStep(
        model, torch.optim.SGD(model.parameters(), 0.0), method=method, attack=Attack(model), label_smoothing=0.3
    )
    loss = step(images, labels)["loss"]
    if method == "at":
        expected = F.cross_entropy(adversarial, labels, label_smoothing=0.3)
    else:
        clean = model(images)
        divergence = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="batchmean")
        expected = F.cross_entropy(clean, labels, label_smoothing=0.3) + 6 * divergence
    torch.testing.assert_close(loss, expected.detach())
    assert seen == [labels]
