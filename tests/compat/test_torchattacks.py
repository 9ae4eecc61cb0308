"""The attacks of torchattacks, bit for bit, with and without its own base class."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.third_party import library
from tests.compat.problem import problem as problem_of
from twins_fast import compat
from twins_fast.compat import torchattacks as ours

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ATTACKS = {
    "FGSM": {"eps": 4 / 255},
    "FFGSM": {},
    "PGD": {"steps": 3},
    "PGD without a random start": {"steps": 3, "random_start": False, "eps": 0.1},
    "PGDL2": {"steps": 3},
    "PGDL2 without a random start": {"steps": 3, "random_start": False, "eps": 0.5},
    "TPGD": {"steps": 3},
    "MIFGSM": {"steps": 4, "decay": 0.7},
}


def imported(theirs):
    """The module as it is where torchattacks is, or is not, installed."""
    hidden = {} if theirs else {"torchattacks": None, "torchattacks.attack": None}
    if theirs:
        library("torchattacks")
    kept = {name: sys.modules.pop(name, None) for name in (*hidden, ours.__name__)}
    sys.modules.update(hidden)
    try:
        return importlib.import_module(ours.__name__)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        compat.torchattacks = ours


@pytest.fixture(params=["their base", "our base"])
def module(request):
    return imported(request.param == "their base")


@pytest.fixture
def problem():
    return problem_of()


def loop(model, images, labels, name, targets=None, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True, decay=1.0):
    """The same attacks again, from their formulas."""
    if name == "FGSM":
        alpha, steps = eps, 1
    alpha = {"FFGSM": 10 / 255, "PGDL2": 0.2}.get(name, alpha)
    eps = 1.0 if name == "PGDL2" and eps == 8 / 255 else eps
    steps = 1 if name == "FFGSM" else steps
    clean, velocity = None, 0
    if name == "FFGSM":
        noise = torch.randn_like(images).uniform_(-eps, eps)
    elif name == "TPGD":
        clean, noise = F.softmax(model(images), 1).detach(), 0.001 * torch.randn_like(images)
    elif name == "PGDL2" and random_start:
        noise = torch.empty_like(images).normal_()
        size = noise.flatten(1).norm(p=2, dim=1).view(-1, 1, 1, 1)
        noise = noise * (torch.zeros_like(size).uniform_(0, 1) / size * eps)
    elif name == "PGD" and random_start:
        noise = torch.empty_like(images).uniform_(-eps, eps)
    else:
        noise = 0
    x = (images + noise).clamp(0, 1) if isinstance(noise, torch.Tensor) else images.clone()
    for _ in range(steps):
        x.requires_grad_()
        if clean is None:
            loss = F.cross_entropy(model(x), labels if targets is None else targets)
            loss = loss if targets is None else -loss
        else:
            loss = F.kl_div(F.log_softmax(model(x), 1), clean, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach()
        if name == "MIFGSM":
            gradient = velocity = gradient / gradient.abs().mean((1, 2, 3), keepdim=True) + velocity * decay
        if name == "PGDL2":
            size = gradient.flatten(1).norm(p=2, dim=1).view(-1, 1, 1, 1) + 1e-10
            x = x + alpha * (gradient / size)
            offset = x - images
            offset = offset * (eps / offset.flatten(1).norm(p=2, dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        else:
            offset = x + alpha * gradient.sign() - images
            if name != "FGSM":
                offset = offset.clamp(-eps, eps)
        x = (images + offset).clamp(0, 1) if name != "FGSM" else (x + alpha * gradient.sign()).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("case", ATTACKS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_same_seed_gives_the_same_images(module, problem, case, normalised, targeted):
    name, options, (model, images, labels) = case.split()[0], ATTACKS[case], problem
    if targeted and name == "TPGD":
        pytest.skip("it has no labels")
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    attack = getattr(module, name)(model, **options, engine="eager")
    given, network = images, model
    if normalised:
        attack.set_normalization_used(MEAN, STD)
        given = (images - mean) / std
        images, network = given * std + mean, lambda x: model((x - mean) / std)
    targets = (labels + 1) % 10
    if targeted:
        attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10)
    torch.manual_seed(1)
    found = attack(given, labels)
    torch.manual_seed(1)
    expected = loop(network, images, labels, name, targets if targeted else None, **options)
    expected = (expected - mean) / std if normalised else expected
    assert torch.equal(found, expected)
    original = getattr(library("torchattacks"), name)(model, **options)
    if normalised:
        original.set_normalization_used(MEAN, STD)
    if targeted:
        original.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10)
    torch.manual_seed(1)
    assert torch.equal(original(given, labels), found)


def test_the_engine_runs_them(module, problem):
    """As strong; signs of gradients that are nearly zero, as TPGD's first ones, need not agree."""
    model, images, labels = problem
    clean = F.softmax(model(images), 1).detach()
    for name in ("PGD", "PGDL2", "TPGD", "MIFGSM", "FGSM"):
        losses = []
        for engine in ("plan", "eager"):
            torch.manual_seed(0)
            logits = model(getattr(module, name)(model, engine=engine)(images, labels))
            far = F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum")
            losses.append(float(far if name == "TPGD" else F.cross_entropy(logits, labels)))
        assert losses[0] == pytest.approx(losses[1], rel=0.05), name


class Noisy(torch.nn.Module):
    """Another network at every call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.01 * torch.randn_like(x))


APGD = {
    "as it comes": {},
    "L2": {"norm": "L2", "eps": 0.15},
    "one step": {"steps": 1},
    "many steps": {"steps": 30},
    "difference of logits": {"loss": "dlr", "seed": 3},
    "restarts": {"n_restarts": 3},
    "rho": {"rho": 0.4, "steps": 20},
    "random network": {"eot_iter": 3},
}


@pytest.mark.parametrize("case", APGD)
def test_apgd_gives_the_same_images(problem, case):
    model, images, _ = problem
    options = {"eps": 1 / 255} | APGD[case]
    images = torch.cat([images, torch.rand(6, 3, 16, 16)])
    with torch.no_grad():
        labels = model(images).argmax(1)
    network = Noisy(model).eval() if "eot_iter" in options else model
    torch.manual_seed(1)  # a first look at the images comes before the attack's own seed
    expected = library("torchattacks").APGD(network, **options)(images, labels)
    torch.manual_seed(1)
    assert torch.equal(ours.APGD(network, engine="eager", **options)(images, labels), expected)
    moved = (expected != images).flatten(1).any(1).sum()
    assert 0 < moved < len(images)


@pytest.mark.parametrize("norm, eps", [("Linf", 1 / 255), ("L2", 0.15)])
def test_apgd_by_the_engine(problem, norm, eps):
    model, images, _ = problem
    images = torch.cat([images, torch.rand(6, 3, 16, 16)])
    with torch.no_grad():
        labels = model(images).argmax(1)
    found = {}
    for engine, dtype in (("eager", None), ("plan", None), ("plan", torch.bfloat16), ("eager", torch.bfloat16)):
        attack = ours.APGD(model.train(), norm=norm, eps=eps, steps=8, engine=engine, amp_dtype=dtype)
        adversarial = attack(images, labels)
        assert model.training and (adversarial - images).flatten(1).norm(float(norm[1:]), dim=1).max() <= eps + 1e-5
        model.eval()
        with torch.no_grad():
            found[engine, dtype] = (model(adversarial).argmax(1) != labels).sum()
    assert found["eager", None] > 0 and max(found.values()) - min(found.values()) <= 1
    with pytest.raises(RuntimeError, match="engine='plan'"):
        ours.APGD(Noisy(model).eval(), engine="plan")(images, labels)


def test_modes_of_targets(module, problem):
    model, images, labels = problem
    attack = module.PGD(model, steps=2)
    assert isinstance(attack, module.Attack) and attack.get_mode() == "default"
    attack.set_mode_targeted_by_label(quiet=True)
    assert attack.get_mode() == "targeted(label)"
    torch.manual_seed(0)
    by_label = attack(images, (labels + 1) % 10)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
    torch.manual_seed(0)
    assert torch.equal(attack(images, labels), by_label)
    with torch.no_grad():
        logits = model(images)
    attack.set_mode_targeted_least_likely(quiet=True)
    least = logits.scatter(1, labels[:, None], torch.inf).argmin(1)
    assert torch.equal(attack.get_target_label(images, labels), least)
    attack.set_mode_targeted_random(quiet=True)
    torch.manual_seed(3)
    chosen = attack.get_target_label(images, labels)
    assert (chosen != labels).all()
    attack.set_mode_default()
    assert not attack.targeted
    with pytest.raises(ValueError, match="not supported"):
        module.TPGD(model).set_mode_targeted_by_label(quiet=True)


def test_flags_are_put_back_and_train_mode_is_all_or_nothing(module, problem):
    model, images, labels = problem
    model.train()
    model.bn1.eval()
    module.PGD(model, steps=1)(images, labels)
    assert model.training and not model.bn1.training
    norm = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    before = norm.running_mean.clone()
    attack = module.PGD(model, steps=1)
    attack.set_model_training_mode(True, True, True)
    attack(images, labels)
    assert not torch.equal(norm.running_mean, before)
    with pytest.raises(NotImplementedError, match="batchnorm_training"):
        attack.set_model_training_mode(True, False, False)


def test_what_cannot_be_honoured_is_said(module, problem):
    with pytest.raises(NotImplementedError, match="verbose"):
        module.APGD(problem[0], verbose=True)
    for options in ({"norm": "L1"}, {"loss": "kl"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            module.APGD(problem[0], **options)
