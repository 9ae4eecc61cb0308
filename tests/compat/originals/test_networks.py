"""Attack packages on two-wing and on accelerated networks: as many images fall, and the same ones."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import state as autoattack_state

from tests.attacks.engine.helpers import small
from tests.attacks.test_libraries import auto_attack, problem_of, seeded
from tests.compat.originals.packages import original
from twins_fast import accelerate, convert_twin_bn

original("scipy")  # without it these packages are not whole
foolbox, torchattacks = original("foolbox"), original("torchattacks")
evasion, classification = original("art.attacks.evasion"), original("art.estimators.classification")
cleverhans = original("cleverhans.torch.attacks.projected_gradient_descent")


def with_foolbox(model, problem):
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return foolbox.attacks.LinfPGD(steps=5)(network, problem.images, problem.labels, epsilons=problem.eps)[1]


def with_torchattacks(model, problem):
    return torchattacks.PGD(model, problem.eps, problem.eps / 4, 5)(problem.images, problem.labels)


def with_art(model, problem):
    shape = tuple(problem.images[0].shape)
    classifier = classification.PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), shape, 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = evasion.ProjectedGradientDescent(
        classifier, eps=problem.eps, eps_step=problem.eps / 2, max_iter=5, verbose=False
    )
    return torch.from_numpy(attack.generate(problem.images.numpy(), problem.labels.numpy()))


def with_cleverhans(model, problem):
    eps = problem.eps
    found = cleverhans.projected_gradient_descent(
        model, problem.images, eps, eps / 2, 5, np.inf, clip_min=0.0, clip_max=1.0
    )
    return found.detach()


PACKAGES = {"foolbox": with_foolbox, "torchattacks": with_torchattacks, "adversarial-robustness-toolbox": with_art,
            "cleverhans": with_cleverhans, "pyautoattack": auto_attack}  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    model = small()
    return problem_of(model, model, 16)


@pytest.fixture
def networks(problem):
    """The network itself, and what has to be as good."""
    twin = convert_twin_bn(copy.deepcopy(problem.model)).eval()
    return problem.model, {"accelerated": accelerate(problem.model), "two wings": twin, "both": accelerate(twin)}


def gradient_of(model, images, labels):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0]


def test_gradients(problem, networks):
    model, others = networks
    expected = gradient_of(model, problem.images, problem.labels)
    for name, network in others.items():
        found = gradient_of(network, problem.images, problem.labels)
        error = (found - expected).flatten(1).norm(dim=1)
        assert (error <= 1e-4 * expected.flatten(1).norm(dim=1)).all(), name


@pytest.mark.parametrize("package", PACKAGES)
def test_robust_images(package, problem, networks):
    model, others = networks
    expected = problem.robust(seeded(lambda network: PACKAGES[package](network, problem), model))
    assert 0 < sum(expected) < len(expected)
    for name, network in others.items():
        found = seeded(lambda network: PACKAGES[package](network, problem), network)
        assert problem.robust(found) == expected, name


def test_the_benchmark_of_robustbench(monkeypatch, problem, networks):
    """Its accuracies, by its own function; the images are ours, as it would download CIFAR-10."""

    class AutoAttack(pyautoattack.AutoAttack):
        """As RobustBench calls the authors' one, with few iterations."""

        def __init__(self, model, norm, eps, version, device, log_path):
            super().__init__(model, norm=norm, eps=eps, seed=0, device=device, version="custom", attacks=["apgd-ce"])
            self.apgd.n_restarts, self.apgd.n_iter = 1, 5

        def run_standard_evaluation(self, x, y, bs, state_path):
            return super().run_standard_evaluation(x, y, batch_size=bs)[0]

    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace(AutoAttack=AutoAttack))
    monkeypatch.setitem(sys.modules, "autoattack.state", autoattack_state)
    evaluation = original("robustbench.eval")
    monkeypatch.setattr(evaluation, "AutoAttack", AutoAttack)
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *_: (problem.images, problem.labels))
    model, others = networks
    clean, robust = evaluation.benchmark(model, eps=problem.eps)
    assert clean == 1 and 0 < robust < 1
    for name, network in others.items():
        assert evaluation.benchmark(network, eps=problem.eps) == (clean, robust), name
