"""The options of the two-wing methods."""

import copy

import pytest
import torch
from torch import nn

from twins_fast import PGD, TrainingStep
from twins_fast.methods import METHODS, TwinsAT
from twins_fast.nn.wings import twin_layers


@pytest.fixture
def pretrained(tiny_model):
    """With statistics that differ from those of any batch."""
    for module in tiny_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return tiny_model


def test_the_warm_up_takes_the_mean_over_adversarial_batches(pretrained, batch):
    images, labels = batch
    plain, method = copy.deepcopy(pretrained), TwinsAT(frozen_statistics="target", warmup_epochs=2, warmup_steps=3)
    assert method.length_of_warmup(10) == 23 and TwinsAT().length_of_warmup(10) == 0
    model = method.prepare(pretrained).train()
    before = copy.deepcopy(model.state_dict())
    attack = PGD(model, steps=2, random_start=False, engine="eager")
    batches = [images, images.flip(0)[:6], images.roll(1, 3)]
    for part in batches:
        method.warm_up(attack, model, part, labels[: len(part)])
    expected, moments = PGD(plain.eval(), steps=2, random_start=False, engine="eager"), []
    for part in batches:
        adversarial = expected(part, labels[: len(part)])
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        other = copy.deepcopy(plain).train()
        other(adversarial)
        moments.append([(m.running_mean, m.running_var) for m in other.modules() if isinstance(m, nn.BatchNorm2d)])
    for layer, *found in zip(twin_layers(model), *moments, strict=True):
        for name, values in zip(("running_mean", "running_var"), zip(*found, strict=True), strict=True):
            torch.testing.assert_close(getattr(layer.main_bn, name), sum(values) / 3)
    for name, value in model.state_dict().items():
        assert ".main_bn." in name or torch.equal(value, before[name]), name
    assert all(layer.wing is None and layer.momentum == 0.1 for layer in twin_layers(model))


def test_random_statistics_are_those_of_other_channels(pretrained):
    layers = twin_layers(TwinsAT(frozen_statistics="random").prepare(pretrained))
    for layer in layers:
        pairs = zip(layer.running_mean.tolist(), layer.running_var.tolist(), strict=True)
        frozen = zip(layer.main_bn.running_mean.tolist(), layer.main_bn.running_var.tolist(), strict=True)
        assert sorted(pairs) == sorted(frozen)
    assert any(not torch.equal(layer.running_mean, layer.main_bn.running_mean) for layer in layers)


def test_shared_weights_get_the_gradient_of_both_wings(tiny_model, batch):
    models = [TwinsAT(affine=affine).prepare(copy.deepcopy(tiny_model)).train() for affine in ("separate", "shared")]
    gradients = []
    for model in models:
        loss = TwinsAT().loss(TwinsAT().forward(model, batch[0], batch[0], batch[1].max()), batch[1])
        loss.backward()
        gradients.append([(layer.weight.grad, layer.main_bn.weight.grad) for layer in twin_layers(model)])
    for (adaptive, frozen), (shared, same) in zip(*gradients, strict=True):
        assert shared is same
        torch.testing.assert_close(shared, adaptive + frozen)
    step = TrainingStep(models[1], torch.optim.SGD(models[1].parameters(), 0.1), method=TwinsAT(affine="shared"))
    step(*batch)
    for layer in twin_layers(models[1]):
        assert layer.weight is layer.main_bn.weight and layer.bias is layer.main_bn.bias


@pytest.mark.parametrize(("name", "instead"), [("twins-at", "at"), ("twins-trades", "trades"), ("twins-mart", "mart")])
def test_a_network_without_batch_norm_is_refused(name, instead):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=f"two wings, but the network has no BatchNorm2d; use '{instead}'$"):
        METHODS[name]().prepare(network)
