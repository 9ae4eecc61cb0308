"""Losses against their formulas, and what they refuse. The recorded trajectories are in test_golden.py."""

import pytest
import torch
import torch.nn.functional as F

from twins_fast import PGD, adversarial_loss, convert_twin_bn, wings
from twins_fast.methods.losses import METHODS


def shifted(images, labels, x_init=None):
    """An attack that needs no gradient."""
    return (images + 0.02).clamp(0, 1)


def test_at_and_standard(tiny_model, batch):
    images, labels = batch
    tiny_model.train()
    loss, metrics = adversarial_loss(tiny_model, images, labels, method="at", attack=shifted)
    torch.testing.assert_close(loss, F.cross_entropy(tiny_model(shifted(images, labels)), labels))
    assert metrics.keys() == {"loss", "accuracy"} and not metrics["loss"].requires_grad
    loss, _ = adversarial_loss(tiny_model, images, labels, method="standard", attack=None)
    torch.testing.assert_close(loss, F.cross_entropy(tiny_model(images), labels))


@pytest.mark.parametrize("rows", [8, 7])
def test_twins_at_weighs_the_frozen_half(tiny_model, batch, rows):
    images, labels = batch[0][:rows], batch[1][:rows]
    model = convert_twin_bn(tiny_model).train()
    loss, metrics = adversarial_loss(model, images, labels, method="twins-at", attack=shifted, twins_lambda=0.3)
    logits, half = model(shifted(images, labels)), rows // 2
    expected = 0.3 * F.cross_entropy(logits[:half], labels[:half]) + F.cross_entropy(logits[half:], labels[half:])
    torch.testing.assert_close(loss, expected)
    correct = (logits.argmax(1) == labels).float()
    assert metrics["frozen_accuracy"] == correct[:half].mean()
    assert metrics["adaptive_accuracy"] == correct[half:].mean()


def test_named_adversaries_differ(tiny_model, batch):
    losses = []
    for name in ("published", "trades"):
        torch.manual_seed(0)
        losses.append(adversarial_loss(tiny_model, *batch, method="trades", attack=name)[0].item())
    assert losses[0] != losses[1]


def test_gradient_reaches_both_wings(tiny_model, batch):
    model = convert_twin_bn(tiny_model).train()
    loss, _ = adversarial_loss(model, *batch, method="twins-trades", attack=PGD(model, steps=1))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.bn1.main_bn.weight.grad.abs().sum() > 0 and model.bn1.weight.grad.abs().sum() > 0


def test_wings_must_fit_the_method(tiny_model, batch):
    with pytest.raises(ValueError, match="no two-wing layers"):
        adversarial_loss(tiny_model, *batch, method="twins-at", attack=shifted)
    model = convert_twin_bn(tiny_model)
    with pytest.raises(ValueError, match="not in mix mode"):
        adversarial_loss(model.eval(), *batch, method="twins-at", attack=shifted)
    with pytest.raises(ValueError, match="whole batch"):
        adversarial_loss(model.train(), *batch, method="at", attack=shifted)
    with wings(model, "adaptive"):
        adversarial_loss(model, *batch, method="at", attack=shifted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fgsm"}, "unknown method 'fgsm'"),
        ({"method": "at", "attack": "cw"}, "unknown attack 'cw'"),
        ({"method": "at", "twins_lambda": -1.0}, "twins_lambda.*-1"),
        ({"method": "at", "trades_beta": float("inf")}, "trades_beta.*inf"),
    ],
)
def test_bad_options_are_refused(tiny_model, batch, options, message):
    with pytest.raises(ValueError, match=message):
        adversarial_loss(tiny_model, *batch, **options)


@pytest.mark.parametrize("method", METHODS)
def test_bad_batches_are_refused_before_anything_is_written(tiny_model, batch, method):
    model = (convert_twin_bn(tiny_model) if method.startswith("twins") else tiny_model).train()
    counted = model.bn1.num_batches_tracked.clone()
    with pytest.raises(ValueError, match="labels must have shape"):
        adversarial_loss(model, batch[0], batch[1][:4], method=method, attack=shifted)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        adversarial_loss(model, batch[0] * 3, batch[1], method=method, attack=shifted)
    assert torch.equal(model.bn1.num_batches_tracked, counted)
    with pytest.raises(ValueError, match="labels hold class 9"):
        adversarial_loss(model, batch[0], batch[1] + 9 - batch[1], method=method, attack=shifted)
