"""Networks and trainers of other libraries that attack by this package, and the published two-wing layer."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.third_party import library
from tests.compat.problem import assert_same_images, problem
from twins_fast import TwinBatchNorm2d, convert_twin_bn, revert_twin_bn
from twins_fast.compat import mair, robustness, twins
from twins_fast.models import CifarResNet
from twins_fast.nn.published import MixBatchNorm2d

OPTIONS = {"constraint": "inf", "eps": 0.03, "step_size": 0.01, "iterations": 3}


class Network(nn.Module):
    """Takes the library's arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, with_latent=False, fake_relu=False, no_relu=False):
        return self.model(x)


@pytest.fixture
def attacker_model(monkeypatch):
    attacker = library("robustness.attacker")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)  # which the library calls
    model, images, labels = problem()
    dataset = SimpleNamespace(mean=torch.tensor([0.4, 0.5, 0.5]), std=torch.tensor([0.2, 0.2, 0.3]))
    return attacker.AttackerModel(Network(model), dataset).eval(), images, labels


CASES = {
    "linf": {},
    "l2": {"constraint": "2", "eps": 0.8, "step_size": 0.3},
    "last": {"use_best": False},
    "targeted": {"targeted": True},
    "random": {"random_start": True},
    "not normalised": {"should_normalize": False},
    "another centre": {"orig_input": 0.5},
    "unconstrained": {"constraint": "unconstrained"},
    "own loss": {"custom_loss": lambda model, x, y: (F.cross_entropy(model(x), (y + 1) % 10, reduction="none"), None)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["eager", "plan"])
def test_the_robustness_library(attacker_model, case, engine):
    model, images, labels = attacker_model
    options = OPTIONS | CASES[case]
    if "orig_input" in options:
        options["orig_input"] = images * 0.98 + 0.01
    torch.manual_seed(1)
    logits, expected = model(images, labels, make_adv=True, **options)
    keys = list(model.state_dict())
    fast = robustness.accelerate(robustness.accelerate(model), engine=engine)
    assert fast is model and list(model.state_dict()) == keys
    torch.manual_seed(1)
    found_logits, found = model(images, labels, make_adv=True, **options)
    assert_same_images(found, expected, images)
    torch.testing.assert_close(found_logits, logits, rtol=0.02, atol=0.02)
    torch.testing.assert_close(copy.deepcopy(model)(images)[0], model(images)[0])


def test_restarts_keep_what_fools_the_network(attacker_model):
    model, images, _ = attacker_model
    labels = model(images)[0].argmax(1)
    robustness.accelerate(model)
    options = OPTIONS | {"random_start": True, "eps": 0.01, "step_size": 0.002, "iterations": 1, "use_best": False}
    fooled = []
    for restarts in (1, 6):
        torch.manual_seed(0)
        _, found = model(images, labels, make_adv=True, random_restarts=restarts, **options)
        fooled.append(int((model(found)[0].argmax(1) != labels).sum()))
    assert fooled[1] >= fooled[0]


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="CifarResNet is no AttackerModel"):
        robustness.accelerate(CifarResNet(3))


def test_a_trainer_of_mair():
    theirs = library("torchattacks")
    model, images, labels = problem()
    trainer = SimpleNamespace(atk=theirs.PGD(model, eps=0.02, alpha=0.01, steps=2))
    torch.manual_seed(0)
    expected = trainer.atk(images, labels)
    assert (
        mair.accelerate(trainer, engine="eager") is trainer
        and type(trainer.atk).__module__ == "twins_fast.compat.torchattacks"
    )
    torch.manual_seed(0)
    assert torch.equal(trainer.atk(images, labels), expected)
    trainer.atk = theirs.PGD(model, eps=0.02, alpha=0.01, steps=2)
    trainer.atk.set_mode_targeted_least_likely(quiet=True)
    trainer.atk.set_model_training_mode(True, True, True)
    torch.manual_seed(0)
    expected = copy.deepcopy(trainer.atk)(images, labels)
    mair.accelerate(trainer, engine="eager")
    torch.manual_seed(0)
    assert torch.equal(trainer.atk(images, labels), expected)
    trainer.atk = theirs.PGD(model)
    trainer.atk.set_model_training_mode(True, False, False)
    with pytest.raises(NotImplementedError, match="batchnorm_training"):
        mair.accelerate(trainer)
    with pytest.raises(TypeError, match="atk is missing"):
        mair.accelerate(SimpleNamespace())
    with pytest.raises(NotImplementedError, match="atk=CW"):
        mair.accelerate(SimpleNamespace(atk=theirs.CW(model)))


# The published layer, written anew.


class FixBatchNorm2d(nn.modules.batchnorm._NormBase):
    def forward(self, x):
        self.num_batches_tracked += self.training
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)


def published():
    class Layer(nn.BatchNorm2d):
        def __init__(self, num_features):
            super().__init__(num_features)
            self.main_bn = FixBatchNorm2d(num_features)
            self.batch_type = "target"

        def forward(self, x):
            if self.batch_type == "target":
                return super().forward(x)
            if self.batch_type == "source":
                return self.main_bn(x)
            half = len(x) // 2
            return torch.cat([self.main_bn(x[:half]), super().forward(x[half:])])

    Layer.__name__ = "MixBatchNorm2d"
    return Layer


def test_networks_with_the_published_layer_are_converted():
    torch.manual_seed(0)
    kind = published()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), kind(4), nn.ReLU(), nn.Conv2d(4, 4, 3), kind(4))
    for layer in model.modules():
        if hasattr(layer, "batch_type"):
            for norm in (layer, layer.main_bn):
                nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias)
                norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    ours = convert_twin_bn(copy.deepcopy(model))
    assert all(isinstance(ours[place], MixBatchNorm2d) for place in (1, 4))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in model.named_parameters()]
    x = torch.randn(6, 3, 9, 9)
    for status, training in (("target", True), ("mix", True), ("source", True), ("target", False), ("mix", False)):
        for network in (model, ours):
            network.train(training).apply({"target": twins.to_target_status, "mix": twins.to_mix_status,
                                           "source": twins.to_source_status}[status])  # fmt: skip
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    for (name, value), other in zip(model.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_layer_under_its_published_name():
    layer = twins.MixBatchNorm2d(4)
    assert isinstance(layer, TwinBatchNorm2d) and layer.batch_type == "target" and layer.wing == "adaptive"
    layer.apply(twins.to_mix_status)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert again.batch_type == "mix" and again.wing == "mix"
    assert type(revert_twin_bn(nn.Sequential(again))[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="batch_type must be one of"):
        layer.batch_type = "adv"
