"""Every argument of the originals: at its place, with its default, and it has an effect or is refused by name."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.third_party import library
from tests.compat.test_wrappers import Network
from twins_fast import compat
from twins_fast.compat import advertorch, dm, robustness, torchattacks, trades, twins  # noqa: F401
from twins_fast.compat.locuslab import fast_adversarial, robust_overfitting  # noqa: F401
from twins_fast.models import CifarResNet

PGD = "predict, loss_fn=None, eps=0.3, nb_iter=40, eps_iter=0.01, rand_init=True, clip_min=0.0, clip_max=1.0"
LOSS = "model, x_natural, y, optimizer, step_size={}, epsilon=0.031, perturb_steps=10, beta={}, distance='l_inf'"
LOCUSLAB = "model, X, y, epsilon, alpha, attack_iters, restarts"
ORIGINALS = {  # as their authors have them
    "torchattacks.FGSM": "model, eps=8 / 255",
    "torchattacks.FFGSM": "model, eps=8 / 255, alpha=10 / 255",
    "torchattacks.PGD": "model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True",
    "torchattacks.PGDL2": "model, eps=1.0, alpha=0.2, steps=10, random_start=True, eps_for_division=1e-10",
    "torchattacks.TPGD": "model, eps=8 / 255, alpha=2 / 255, steps=10",
    "torchattacks.MIFGSM": "model, eps=8 / 255, alpha=2 / 255, steps=10, decay=1.0",
    "torchattacks.APGD": "model, norm='Linf', eps=8 / 255, steps=10, n_restarts=1, seed=0, loss='ce', eot_iter=1, "
    "rho=0.75, verbose=False",
    "advertorch.PGDAttack": f"{PGD}, ord=torch.inf, l1_sparsity=None, targeted=False",
    "advertorch.LinfPGDAttack": f"{PGD}, targeted=False",
    "advertorch.L2PGDAttack": f"{PGD}, targeted=False",
    "dm.PGDAttack": f"{PGD}, ord=torch.inf, targeted=False, rand_init_type='uniform'",
    "dm.LinfPGDAttack": f"{PGD}, targeted=False, rand_init_type='uniform'",
    "dm.L2PGDAttack": f"{PGD}, targeted=False, rand_init_type='uniform'",
    "dm.FGSMAttack": "predict, loss_fn=None, eps=0.3, clip_min=0.0, clip_max=1.0, targeted=False",
    "dm.FGMAttack": "predict, loss_fn=None, eps=0.3, clip_min=0.0, clip_max=1.0, targeted=False",
    "dm.LinfAPGDAttack": "predict, loss_fn='ce', n_restarts=2, eps=0.3, nb_iter=40, seed=1",
    "dm.L2APGDAttack": "predict, loss_fn='ce', n_restarts=2, eps=0.3, nb_iter=40, seed=1",
    "dm.create_attack": "model, criterion, attack_type, attack_eps, attack_iter, attack_step, "
    "rand_init_type='uniform', clip_min=0.0, clip_max=1.0",
    "trades.trades_loss": LOSS.format(0.003, 1.0),
    "trades.mart_loss": LOSS.format(0.007, 6.0),
    "trades.perturb_input": "model, x_natural, step_size=0.003, epsilon=0.031, perturb_steps=10, distance='l_inf'",
    "trades.AdvWeightPerturb": "model, proxy, proxy_optim, gamma",
    "trades.AdvWeightPerturb.calc_awp": "self, inputs_adv, targets",
    "trades.TradesAWP": "model, proxy, proxy_optim, gamma",
    "trades.TradesAWP.calc_awp": "self, inputs_adv, inputs_clean, targets, beta",
    "locuslab.fast_adversarial.attack_pgd": f"{LOCUSLAB}, opt=None",
    "locuslab.robust_overfitting.attack_pgd": f"{LOCUSLAB}, norm, early_stop=False, mixup=False, y_a=None, y_b=None, "
    "lam=None",
    "twins.FastGradientSignUntargeted": "model, epsilon, alpha, min_val, max_val, max_iters, _type='linf'",
    "twins.FastGradientSignUntargeted.perturb": "self, original_images, labels, reduction4loss='mean', "
    "random_start=False",
    "twins.FastGradientSignUntargeted.perturb_IN": "self, original_images, labels, reduction4loss='mean', "
    "random_start=False",
    "robustness._FastAttacker.forward": "self, x, target, *_, constraint, eps, step_size, iterations, "
    "random_start=False, random_restarts=False, do_tqdm=False, targeted=False, custom_loss=None, "
    "should_normalize=True, orig_input=None, use_best=True, return_image=True, est_grad=None, mixed_precision=False",
}


def adapter(name):
    found = compat
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", ORIGINALS)
def test_they_stand_where_the_original_has_them(name):
    theirs = inspect.signature(eval(f"lambda {ORIGINALS[name]}: 0")).parameters.values()
    ours = list(inspect.signature(adapter(name)).parameters.values())
    for their, our in zip(theirs, ours, strict=False):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    rest = ours[len(theirs) :]
    assert len(ours) >= len(theirs)
    assert all(our.kind in (our.KEYWORD_ONLY, our.VAR_KEYWORD) for our in rest), "ours come behind, by name"


# What the others differ from, where the defaults above do not say it: short attacks that reach pixels at the bounds.
GIVEN = {
    "torchattacks.APGD": {"eps": 0.032, "steps": 2},
    "advertorch": {"eps": 0.05, "nb_iter": 2, "eps_iter": 0.02},
    "dm": {"eps": 0.05, "nb_iter": 2, "eps_iter": 0.02},
    "dm.FGSMAttack": {},
    "dm.FGMAttack": {},
    "dm.LinfAPGDAttack": {"eps": 0.032, "nb_iter": 2},
    "dm.L2APGDAttack": {"eps": 0.16, "nb_iter": 2},
    "dm.create_attack": {
        "criterion": None, "attack_type": "linf-pgd", "attack_eps": 0.05, "attack_iter": 2, "attack_step": 0.02
    },
    "trades": {"perturb_steps": 2, "step_size": 0.01},
    "locuslab.fast_adversarial": {
        "epsilon": torch.full((3, 1, 1), 0.02), "alpha": 0.01, "attack_iters": 2, "restarts": 1,
        "lower_limit": torch.zeros(3, 1, 1), "upper_limit": torch.ones(3, 1, 1),
    },
    "locuslab.robust_overfitting": {
        "epsilon": 0.1, "alpha": 0.05, "attack_iters": 2, "restarts": 1, "norm": "l_inf"
    },
    "twins": {"epsilon": 0.05, "alpha": 0.02, "min_val": 0.0, "max_val": 1.0, "max_iters": 2},
    "robustness": {"constraint": "inf", "eps": 0.02, "step_size": 0.012, "iterations": 4, "random_start": True},
}  # fmt: skip


def confidence(logits, labels):
    """Another loss than the cross-entropy."""
    return -logits.gather(1, labels[:, None]).sum()


OTHER = {  # another value of each argument; of a flag the other one
    "eps": 0.01, "epsilon": 0.01, "attack_eps": 0.01, "alpha": 0.001, "eps_iter": 0.001, "attack_step": 0.001,
    "step_size": 0.001, "steps": 1, "nb_iter": 1, "attack_iter": 1, "attack_iters": 1, "perturb_steps": 1,
    "max_iters": 1, "iterations": 1, "restarts": 4, "n_restarts": 8,
    "eps_for_division": 1.0, "decay": 0.1, "norm": "L2", "ord": 2, "constraint": "2", "distance": "l_2", "_type": "l2",
    "seed": 2, "loss": "dlr", "eot_iter": 2, "rho": 1.5, "l1_sparsity": 0.9, "loss_fn": confidence,
    "criterion": confidence, "attack_type": "l2-pgd", "rand_init_type": "normal", "clip_min": -0.2, "clip_max": 1.2,
    "min_val": -0.2, "max_val": 1.2, "beta": 3.0, "reduction4loss": "sum", "opt": object(),
    "custom_loss": lambda model, x, y: (confidence(model(x), y)[None].expand(len(y)), None),
    "orig_input": torch.full((16, 3, 8, 8), 0.5), "est_grad": (0.1, 4),
}  # fmt: skip
ELSEWHERE = {  # (adapter, argument) -> another value for this one
    ("locuslab.fast_adversarial.attack_pgd", "epsilon"): torch.full((3, 1, 1), 0.01),
    ("locuslab.robust_overfitting.attack_pgd", "norm"): "l_2",
    ("robustness._FastAttacker.forward", "random_restarts"): 3,
    ("dm.LinfAPGDAttack", "loss_fn"): "dlr",
    ("dm.L2APGDAttack", "loss_fn"): "dlr",
}
WITHOUT_EFFECT = {
    "eot_iter": "of a network without randomness: test_torchattacks.py",
    "reduction4loss": "signs of gradients do not depend on it",
    "return_image": "its images are no others unless constraint is 'fourier', which the library runs itself",
    "do_tqdm": "the library runs then, and shows how far it is",
    **dict.fromkeys(("mixup", "y_a", "y_b", "lam"), "together: test_loops.py"),
}
MADE_HERE = ("self", "model", "predict", "x_natural", "X", "x", "y", "target", "labels", "optimizer", "proxy",
             "proxy_optim", "gamma", "inputs_adv", "inputs_clean", "targets", "original_images", "_")  # fmt: skip
PAIRS = [
    (name, argument)
    for name, text in ORIGINALS.items()
    if not name.startswith(("trades.Adv", "trades.TradesAWP"))  # test_trades.py
    for argument in inspect.signature(eval(f"lambda {text}: 0")).parameters
    if argument not in (*MADE_HERE, *WITHOUT_EFFECT)
]


def given(name):
    parts = name.split(".")
    return next((GIVEN[key] for n in (3, 2, 1) if (key := ".".join(parts[:n])) in GIVEN), {})


def other(name, argument):
    if (name, argument) in ELSEWHERE:
        return ELSEWHERE[name, argument]
    usual = inspect.signature(eval(f"lambda {ORIGINALS[name]}: 0")).parameters[argument].default
    usual = given(name).get(argument, usual)
    return not usual if isinstance(usual, bool) else OTHER[argument]


def result(name, **changed):
    """What an adapter gives for its arguments."""
    torch.manual_seed(0)
    model = CifarResNet(num_classes=5, width=4, blocks=(1, 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.rand(16, 3, 8, 8)
        labels = model(images).argmax(1)
    options = given(name) | changed
    module, kind = name.split(".")[0], adapter(name)
    how = {"engine": "eager"}
    torch.manual_seed(1)
    if module == "trades":
        batch = (images,) if name.endswith("input") else (images, labels, torch.optim.SGD(model.parameters(), 0.1))
        return kind(model, *batch, **options, **how).detach()
    if module == "locuslab":
        return kind(model, images, labels, **options, **how)
    if module == "robustness":
        dataset = SimpleNamespace(mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25))
        network = library("robustness.attacker").AttackerModel(Network(model), dataset).eval()
        return robustness.accelerate(network, **how)(images, labels, make_adv=True, **options)[1]
    if module == "twins":
        call = {key: options.pop(key) for key in ("reduction4loss", "random_start") if key in options}
        attack = twins.FastGradientSignUntargeted(model, **options, **how)
        if name.endswith("IN"):
            model.forward_IN = model.forward
        return getattr(attack, name.split(".")[2] if name.count(".") == 2 else "perturb")(images, labels, **call)
    attack = kind(model, **options, **how)
    found = attack(images, labels) if module == "torchattacks" else attack.perturb(images, labels)
    return found[0] if module == "dm" else found


usual = functools.cache(result)  # with what is given alone


@pytest.mark.parametrize("name, argument", PAIRS)
def test_none_is_ignored(monkeypatch, name, argument):
    library("robustness.attacker")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)  # which it calls
    expected = usual(name)
    try:
        found = result(name, **{argument: other(name, argument)})
    except NotImplementedError as refusal:
        assert argument in str(refusal)
        return
    assert not torch.equal(found, expected)


def test_what_advertorch_takes_as_the_range_of_the_pixel_values():
    for kind in (advertorch.LinfPGDAttack, dm.LinfPGDAttack):
        for name in ("clip_min", "clip_max"):
            for bound in (None, torch.zeros(3, 8, 8)):
                with pytest.raises(NotImplementedError, match=name):
                    kind(nn.Identity(), **{name: bound})
    low = torch.tensor([0.0, -0.5, 0.0]).view(3, 1, 1)
    found = result("advertorch.LinfPGDAttack", clip_min=low)
    assert torch.equal(found[:, ::2], found[:, ::2].clamp(0, 1)) and (found[:, 1] < 0).any()


def test_what_no_argument_is_called_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)
    for name in GIVEN:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            result(next(key for key in ORIGINALS if key.startswith(name)), tempo=2)
