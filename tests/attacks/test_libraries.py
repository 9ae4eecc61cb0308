"""Attack libraries get the same from an accelerated network as from the network itself, and leave it as it was."""

import copy
import itertools
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from bench.third_party import library
from tests.attacks.engine.helpers import assert_untouched, data, lively, small, state_of
from twins_fast import accelerate, convert_twin_bn

foolbox = library("foolbox")
torchattacks = library("torchattacks")
evasion, classification = library("art.attacks.evasion"), library("art.estimators.classification")
cleverhans = library("cleverhans.torch.attacks.projected_gradient_descent")
attacker, resnet = library("robustness.attacker"), library("robustness.cifar_models.resnet")

CANDIDATES, EACH = 64, 6
STEPS = 5
SAME_PIXELS = 0.99  # of an attack's result: where a gradient is zero within roundoff, its sign is anything
ROUNDOFF = 1e-5  # of a pixel
MEAN, STD = torch.tensor([0.45, 0.4, 0.5]), torch.tensor([0.2, 0.25, 0.3])


@dataclass
class Problem:
    """A network, images with the labels it gives them, and the radius at which half of them fall."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float

    @property
    def eps_l2(self) -> float:
        """The radius in the L2 norm that divides these images as clearly."""
        return 0.75 * self.eps * self.images[0].numel() ** 0.5

    def robust(self, adversarial: Tensor) -> list[bool]:
        with torch.no_grad():
            return (self.model(adversarial).argmax(1) == self.labels).tolist()


def problem_of(network: nn.Module, model: nn.Module, size: int) -> Problem:
    """Images of which half fall much below a radius and half much above, so that roundoff decides nothing.

    ``network`` is what is attacked: ``model``, or with something before it.
    """
    images, _ = data(CANDIDATES, size)
    leaf = images.requires_grad_()
    logits = network(leaf)
    labels = logits.argmax(1)
    gradients = torch.stack([torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in logits.T], 1)
    own = labels[:, None], labels[:, None, None].expand(-1, 1, images[0].numel())
    gap = logits.gather(1, own[0]) - logits
    slope = (gradients.flatten(2).gather(1, own[1]) - gradients.flatten(2)).abs().sum(2)
    radii, order = (gap / slope).nan_to_num(torch.inf).amin(1).detach().sort()
    chosen = torch.cat([order[:EACH], order[-EACH:]])
    eps = (radii[EACH - 1] * radii[-EACH]).sqrt().item()
    return Problem(network, images.detach()[chosen], labels[chosen], eps)


@pytest.fixture(scope="module")
def problem():
    model = small()
    return problem_of(model, model, 16)


@contextmanager
def forwards_of(model: nn.Module):
    """Counts the calls of the model's own forward, in a way that changes nothing about the model."""
    code, before, calls = type(model).forward.__code__, sys.getprofile(), []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if (event, frame.f_code) == ("call", code) else 0)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def seeded(attack, model):
    torch.manual_seed(0)
    np.random.seed(0)
    return attack(model)


def gradient_of(model, images, labels):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0]


def planned(model, images, labels):
    """The accelerated model; its plan is made, checked, and has the model's gradient."""
    fast = accelerate(model)
    explanation = fast.explain(images)
    assert explanation.engine == "plan", explanation.reason
    expected = gradient_of(model, images, labels)
    error = (gradient_of(fast, images, labels) - expected).flatten(1).norm(dim=1)
    assert (error <= 1e-4 * expected.flatten(1).norm(dim=1)).all()
    return fast


def compare(attack, problem, model=None, sizes=1):
    """``attack(network)`` gives the same adversarial images from the network and from the accelerated one.

    Args:
        model: what is accelerated, if ``attack`` puts something before it.
        sizes: how many numbers of images occur; for each but the first the model may be called once, to check.
    """
    model = problem.model if model is None else model
    expected = seeded(attack, model)
    model.zero_grad()  # some libraries leave gradients in the parameters
    before = state_of(model)
    fast = planned(model, problem.images, problem.labels)
    with forwards_of(model) as calls:
        adversarial = seeded(attack, fast)
    assert len(calls) < sizes
    assert_untouched(model, before)
    robust = problem.robust(expected)
    assert problem.robust(adversarial) == robust and 0 < sum(robust) < len(robust)
    assert not torch.equal(adversarial, problem.images)
    assert ((adversarial - expected).abs() <= ROUNDOFF).float().mean() >= SAME_PIXELS


def loop(model, problem, eps=None):
    """PGD in a few lines, for those who need no library."""
    x, eps = problem.images.clone(), problem.eps if eps is None else eps
    for _ in range(STEPS):
        x = x + eps / 2 * gradient_of(model, x, problem.labels).sign()
        x = x.clamp(problem.images - eps, problem.images + eps).clamp(0, 1)
    return x


def test_a_plain_loop(problem):
    compare(lambda model: loop(model, problem), problem)


def test_a_plain_loop_in_half_precision(problem):
    fast = accelerate(problem.model, torch.bfloat16)
    assert fast.explain(problem.images).engine == "plan"
    expected = problem.robust(loop(problem.model, problem))
    assert problem.robust(loop(fast, problem)) == expected


def auto_attack(model, problem, *names):
    """AutoAttack with few iterations; its standard version if no attacks are named."""
    chosen = {"attacks": list(names), "version": "custom"} if names else {}
    attack = AutoAttack(model, eps=problem.eps, seed=0, device="cpu", **chosen)
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = STEPS
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
    attack.square.n_queries = 100
    return attack.run_standard_evaluation(problem.images, problem.labels)[0]


@pytest.mark.parametrize("names", [("apgd-ce",), ("apgd-dlr",), ("apgd-t",), ("fab",), ("fab-t",), ("square",), ()])
def test_pyautoattack(names, problem, caplog):
    # each image that falls makes a new number of images
    compare(lambda model: auto_attack(model, problem, *names), problem, sizes=len(problem.images))
    assert not [line for line in caplog.messages if "defense" in line]  # what its checks say of odd networks


@pytest.mark.parametrize("kind", ["accelerated", "two wings", "two wings, accelerated"])
def test_pyautoattack_has_nothing_to_warn_of(kind, problem, caplog, capsys):
    """No flag of its checks (randomised or dynamic defence, zero gradients, probabilities, Square's success)."""
    model = convert_twin_bn(copy.deepcopy(problem.model)).eval() if "wings" in kind else problem.model
    network = accelerate(model) if "accelerated" in kind else model
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        robust = problem.robust(auto_attack(network, problem))
    assert 0 < sum(robust) < len(robust)
    assert not caplog.messages and not any(capsys.readouterr())


TORCHATTACKS = {  # options by radius
    "PGD": lambda eps: {"eps": eps, "alpha": eps / 4},
    "MIFGSM": lambda eps: {"eps": eps, "alpha": eps / 4},
    "VMIFGSM": lambda eps: {"eps": eps, "alpha": eps / 4, "N": 2},
    "DIFGSM": lambda eps: {"eps": eps, "alpha": eps / 4},
    "APGD": lambda eps: {"eps": eps},
    "CW": lambda eps: {"c": 10, "lr": eps},  # the images are no leaf: it optimises their arctanh
}


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_torchattacks(name, problem):
    def attack(model):
        chosen = getattr(torchattacks, name)(model, steps=STEPS, **TORCHATTACKS[name](problem.eps))
        return chosen(problem.images, problem.labels)

    compare(attack, problem)


def test_torchattacks_on_a_network_in_train_mode(problem):
    def attack(model):
        return torchattacks.PGD(model, problem.eps, problem.eps / 4, STEPS)(problem.images, problem.labels)

    fast = planned(problem.model, problem.images, problem.labels)
    expected = seeded(attack, problem.model)
    fast.train()
    assert problem.model.training
    before = state_of(problem.model)
    with forwards_of(problem.model) as calls:
        adversarial = seeded(attack, fast)
    assert_untouched(problem.model, before)
    problem.model.eval()
    assert not calls and ((adversarial - expected).abs() <= ROUNDOFF).float().mean() >= SAME_PIXELS


@pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L2BasicIterativeAttack"])
def test_foolbox(name, problem):
    eps = problem.eps if name == "LinfPGD" else problem.eps_l2

    def attack(model):
        network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        chosen = getattr(foolbox.attacks, name)(rel_stepsize=0.5, steps=STEPS)
        _, x, _ = chosen(network, problem.images, problem.labels, epsilons=eps)
        return x

    compare(attack, problem)


def test_art(problem):
    def attack(model):
        classifier = classification.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(problem.images[0].shape), 10, clip_values=(0, 1), device_type="cpu"
        )
        pgd = evasion.ProjectedGradientDescent(
            classifier, eps=problem.eps, eps_step=problem.eps / 2, max_iter=STEPS, verbose=False
        )
        return torch.from_numpy(pgd.generate(problem.images.numpy(), problem.labels.numpy()))

    compare(attack, problem)


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_cleverhans(norm, problem):
    eps = problem.eps if norm == np.inf else problem.eps_l2

    def attack(model):  # without labels: it asks the model for them
        return cleverhans.projected_gradient_descent(
            model, problem.images, eps, eps / 2, STEPS, norm, clip_min=0.0, clip_max=1.0
        ).detach()

    compare(attack, problem)


@pytest.fixture(scope="module")
def normalised():
    """The ResNet of MadryLab's library, narrow and shallow, behind its normaliser; and the problem of both."""
    torch.manual_seed(0)
    model = lively(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], wm=1 / 8))
    network = attacker.AttackerModel(model, SimpleNamespace(mean=MEAN, std=STD)).eval()
    return model, problem_of(nn.Sequential(network.normalizer, model), model, 32)


@pytest.fixture
def no_cuda(monkeypatch):
    """Its attacker moves images to a GPU, whether there is one or not."""
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)


@pytest.mark.parametrize("constraint", ["inf", "2"])
def test_robustness(constraint, normalised, no_cuda):
    model, problem = normalised
    eps = problem.eps if constraint == "inf" else problem.eps_l2

    def attack(model):
        network = attacker.AttackerModel(model, SimpleNamespace(mean=MEAN, std=STD)).eval()
        options = {"constraint": constraint, "eps": eps, "step_size": eps / 2, "iterations": STEPS}
        found.append(network(problem.images, problem.labels, make_adv=True, **options))
        return found[-1][1]

    found = []
    compare(attack, problem, model)
    logits, adversarial = found[-1]
    torch.testing.assert_close(logits, problem.model(adversarial), rtol=1e-3, atol=1e-3)


def test_keywords_of_robustness(normalised, no_cuda):
    model, problem = normalised
    fast = planned(model, problem.images, problem.labels)
    network = attacker.AttackerModel(fast, SimpleNamespace(mean=MEAN, std=STD)).eval()
    with forwards_of(model) as calls:
        logits, _ = network(problem.images)
        assert not calls
        (again, latent), _ = network(problem.images, with_latent=True)
        assert len(calls) == 1
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.linear(latent), again)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["after the forward", "before the backward", "after the backward"])
def test_an_error_in_the_middle(where, problem):
    class Fails(foolbox.attacks.LinfPGD):
        def get_loss_fn(self, model, labels):
            loss, count = super().get_loss_fn(model, labels), itertools.count(1)

            def stop(*arguments):
                raise Stop

            def failing(inputs):
                value = loss(inputs)
                if next(count) == 3:
                    if where == "after the forward":
                        stop()
                    (value if where == "before the backward" else inputs).raw.register_hook(stop)
                return value

            return failing

    def attack(model, kind):
        network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return kind(steps=STEPS)(network, problem.images, problem.labels, epsilons=problem.eps)[1]

    before = state_of(problem.model)
    fast = planned(problem.model, problem.images, problem.labels)
    expected = seeded(lambda model: attack(model, foolbox.attacks.LinfPGD), fast)
    with pytest.raises(Stop):
        attack(fast, Fails)
    assert_untouched(problem.model, before)
    with forwards_of(problem.model) as calls:
        assert torch.equal(seeded(lambda model: attack(model, foolbox.attacks.LinfPGD), fast), expected)
    assert not calls
    assert_untouched(problem.model, before)
