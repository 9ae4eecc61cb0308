"""Losses against their formulas, and what they refuse. The recorded trajectories are in test_golden.py."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from twins_fast import PGD, adversarial_loss, convert_twin_bn, wings
from twins_fast.attacks import pgd
from twins_fast.attacks.pgd import ADVERSARIES, Adversary
from twins_fast.methods import AT, METHODS, TwinsAT, base
from twins_fast.options import known

SHORT = [name for name, method in METHODS.items() if not method.needs_pretrained]  # what adversarial_loss knows


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
    torch.testing.assert_close(metrics["frozen_loss"], F.cross_entropy(logits[:half], labels[:half]).detach())
    torch.testing.assert_close(metrics["adaptive_loss"], F.cross_entropy(logits[half:], labels[half:]).detach())


@pytest.mark.parametrize("method", ["twins-at", "twins-trades", "twins-mart"])
def test_the_losses_of_the_wings_make_up_the_loss(tiny_model, batch, method):
    chosen = METHODS[method](frozen_weight=0.3)
    model = chosen.prepare(tiny_model).train()
    loss, metrics = adversarial_loss(model, *batch, method=method, attack=shifted, twins_lambda=0.3)
    torch.testing.assert_close(0.3 * metrics["frozen_loss"] + metrics["adaptive_loss"], loss.detach())
    assert metrics["frozen_loss"] > 0 and metrics["frozen_loss"] != metrics["adaptive_loss"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("ce", {}), ("published", {}), ("trades", {"loss": "kl", "random_start": "normal"})],
)
def test_a_named_adversary_is_that_attack(tiny_model, batch, name, options):
    models = tiny_model, copy.deepcopy(tiny_model)
    losses = []
    for model, attack in zip(models, (name, PGD(models[1], **options)), strict=True):
        torch.manual_seed(0)
        losses.append(adversarial_loss(model, *batch, method="trades", attack=attack)[0].item())
    assert losses[0] == losses[1]


def test_adversaries_are_annotated_as_they_are():
    assert set(get_args(Adversary)) == set(ADVERSARIES)


def test_each_adversary_finds_more_of_what_it_maximises(tiny_model, batch):
    images, labels = batch
    tiny_model.eval().requires_grad_(False)
    clean, logits = tiny_model(images), {}
    for name in ADVERSARIES:
        torch.manual_seed(0)
        logits[name] = tiny_model(AT(adversary=name).attack(tiny_model)(images, labels))
    kl = {name: F.kl_div(found.log_softmax(1), clean.softmax(1), reduction="sum") for name, found in logits.items()}
    assert F.cross_entropy(logits["ce"], labels) > F.cross_entropy(logits["trades"], labels)
    assert kl["trades"] > kl["ce"]


@pytest.mark.parametrize("method", SHORT)
def test_a_method_object_and_the_short_form_are_one(tiny_model, batch, method):
    images, labels = batch
    chosen = known(METHODS[method], frozen_weight=0.3, beta=2.0)
    model = chosen.prepare(tiny_model).train()
    twin = copy.deepcopy(model)
    attack = chosen.attack(model, steps=2, random_start=False)
    largest_label = chosen.check(model, images, labels)
    adversarial = chosen.perturb(attack, model, images, labels, largest_label)
    logits = chosen.forward(model, images, adversarial, largest_label)
    loss, metrics = chosen.loss(logits, labels), chosen.metrics(logits, labels)
    short = {"method": method, "attack": chosen.attack(twin, steps=2, random_start=False), "twins_lambda": 0.3}
    other, other_metrics = adversarial_loss(twin, images, labels, trades_beta=2.0, **short)
    assert torch.equal(loss, other) and metrics == {k: v for k, v in other_metrics.items() if k != "loss"}
    assert [id(p) for p in chosen.parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", SHORT)
def test_a_step_looks_at_its_batch_once(tiny_model, batch, method, monkeypatch):
    looked = []
    for module in (base, pgd):
        monkeypatch.setattr(module, "check_images", lambda *_, name=module.__name__: looked.append(name))
    model = METHODS[method]().prepare(tiny_model).train()
    adversarial_loss(model, *batch, method=method, attack=PGD(model, steps=1))
    assert looked == [base.__name__]


def test_options_of_a_method_are_checked():
    with pytest.raises(ValueError, match="frozen_weight must be a finite number >= 0, got -1"):
        TwinsAT(frozen_weight=-1.0)
    with pytest.raises(ValueError, match="unknown adversary 'cw'"):
        AT(adversary="cw")


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


@pytest.mark.parametrize("method", SHORT)
def test_bad_batches_are_refused_before_anything_is_written(tiny_model, batch, method):
    model = METHODS[method]().prepare(tiny_model).train()
    counted = model.bn1.num_batches_tracked.clone()
    with pytest.raises(ValueError, match="labels must have shape"):
        adversarial_loss(model, batch[0], batch[1][:4], method=method, attack=shifted)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        adversarial_loss(model, batch[0] * 3, batch[1], method=method, attack=shifted)
    assert torch.equal(model.bn1.num_batches_tracked, counted)
    with pytest.raises(ValueError, match="labels hold class 9"):
        adversarial_loss(model, batch[0], batch[1] + 9 - batch[1], method=method, attack=shifted)
