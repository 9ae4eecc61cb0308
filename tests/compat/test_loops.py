"""Attacks of advertorch, DM-Improves-AT, fast_adversarial, robust_overfitting and TWINS against their loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compat.problem import assert_same_images, lengths, problem
from twins_fast.compat import advertorch, dm
from twins_fast.compat.locuslab import fast_adversarial, robust_overfitting
from twins_fast.compat.twins import FastGradientSignUntargeted

ENGINES = ("eager", "plan")
MEAN, STD = robust_overfitting.cifar10_mean, robust_overfitting.cifar10_std


def gradient_of(model, x, labels, loss=F.cross_entropy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(model(x), labels), x)[0]


def advertorch_loop(model, images, labels, norm, eps, alpha, steps, start, sign=1):
    delta = start
    for _ in range(steps):
        gradient = sign * gradient_of(model, images + delta, labels)
        if norm == "linf":
            delta = (delta + alpha * gradient.sign()).clamp(-eps, eps)
            delta = (images + delta).clamp(0, 1) - images
        else:
            delta = delta + alpha * gradient / lengths(gradient).clamp(min=1e-6)
            delta = (images + delta).clamp(0, 1) - images
            delta = delta * (eps / lengths(delta)).clamp(max=1)
    return (images + delta).clamp(0, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm, eps, alpha", [("linf", 0.05, 0.02), ("l2", 0.8, 0.3)])
@pytest.mark.parametrize("targeted", [False, True])
def test_advertorch_and_dm(engine, norm, eps, alpha, targeted):
    model, images, labels = problem()
    torch.manual_seed(1)
    if norm == "linf":
        start = torch.empty_like(images).uniform_(-1, 1) * eps
    else:
        start = torch.empty_like(images).uniform_(0, 1) - images
        start = start * (eps / lengths(start)).clamp(max=1)
    start = (images + start).clamp(0, 1) - images
    expected = advertorch_loop(model, images, labels, norm, eps, alpha, 3, start, -1 if targeted else 1)
    for module in (advertorch, dm):
        kind = module.LinfPGDAttack if norm == "linf" else module.L2PGDAttack
        attack = kind(
            model, loss_fn=nn.CrossEntropyLoss(reduction="sum"), eps=eps, nb_iter=3, eps_iter=alpha, targeted=targeted,
            engine=engine,
        )  # fmt: skip
        torch.manual_seed(1)
        found = attack.perturb(images, labels)
        if module is dm:
            found, perturbation = found
            assert torch.equal(perturbation, found - images)
        assert_same_images(found, expected, images)


def test_advertorch_without_labels_with_radii_by_image_and_another_loss():
    model, images, _ = problem()
    predicted = model(images).argmax(1)
    eps = torch.linspace(0.01, 0.06, 6)
    attack = advertorch.LinfPGDAttack(model, eps=eps, nb_iter=2, eps_iter=0.02, rand_init=False, engine="eager")
    size = (attack(images) - images).abs().flatten(1).amax(1)
    assert (size <= eps + 1e-6).all() and (size > eps / 2).all()
    other = advertorch.LinfPGDAttack(
        model, lambda logits, labels: -logits.gather(1, labels[:, None]).sum(), 0.05, 2, 0.02, False, engine="plan"
    )
    expected = images
    for _ in range(2):
        gradient = gradient_of(model, expected, predicted, lambda z, y: -z.gather(1, y[:, None]).sum())
        expected = (images + (expected + 0.02 * gradient.sign() - images).clamp(-0.05, 0.05)).clamp(0, 1)
    assert_same_images(other.perturb(images, predicted), expected, images)
    with pytest.raises(ValueError, match="needs targets"):
        advertorch.LinfPGDAttack(model, targeted=True).perturb(images)
    for options in ({"ord": 1}, {"l1_sparsity": 0.9}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            advertorch.PGDAttack(model, **options)


@pytest.mark.parametrize("name, norm, eps, alpha", [("linf-pgd", "linf", 0.05, 0.02), ("l2-pgd", "l2", 0.8, 0.3)])
def test_dm_starts_as_trades_does(name, norm, eps, alpha):
    model, images, labels = problem()
    torch.manual_seed(1)
    expected = advertorch_loop(model, images, labels, norm, eps, alpha, 3, 0.001 * torch.randn_like(images))
    torch.manual_seed(1)
    options = {"rand_init_type": "normal", "engine": "eager"}
    attack = dm.create_attack(model, nn.CrossEntropyLoss(), name, eps, 3, alpha, **options)
    assert_same_images(attack.perturb(images, labels)[0], expected, images)


def test_dm_attacks_by_name():
    model, images, labels = problem()
    with torch.no_grad():
        labels = model(images).argmax(1)
    for name in dm.ATTACKS:
        eps = 0.02 if name.startswith(("linf", "fgsm")) else 0.5
        if name.endswith("-df"):
            with pytest.raises(NotImplementedError, match="attack_type='l.*-df'"):
                dm.create_attack(model, None, name, eps, 5, eps / 4)
            continue
        adversarial, perturbation = dm.create_attack(model, None, name, eps, 5, eps / 4).perturb(images, labels)
        norm = float("inf") if eps == 0.02 else 2
        assert torch.equal(perturbation, adversarial - images), name
        assert perturbation.flatten(1).norm(norm, dim=1).max() <= eps + 1e-5 and 0 <= adversarial.min()
        assert (model(adversarial).argmax(1) != labels).any(), name
    gradient = gradient_of(model, images, labels)
    found, _ = dm.create_attack(model, nn.CrossEntropyLoss(), "fgsm", 0.02, 1, 0).perturb(images, labels)
    assert_same_images(found, (images + 0.02 * gradient.sign()).clamp(0, 1), images)
    found, _ = dm.create_attack(model, nn.CrossEntropyLoss(), "fgm", 0.5, 1, 0).perturb(images, labels)
    assert_same_images(found, (images + 0.5 * gradient / lengths(gradient)).clamp(0, 1), images)
    with pytest.raises(NotImplementedError, match="attack_type='cw' is none of"):
        dm.create_attack(model, None, "cw", 0.1, 1, 0.1)
    with pytest.raises(NotImplementedError, match="rand_init_type"):
        dm.create_attack(model, None, "linf-pgd", 0.1, 1, 0.1, rand_init_type="zero")


def locuslab_loop(
    model, images, labels, eps, alpha, steps, start, low, high, norm="linf", early=True, loss=F.cross_entropy
):
    """From each start in turn; the perturbation with the highest loss."""
    best, most = torch.zeros_like(images), torch.zeros(len(images))
    for delta in start:
        for _ in range(steps):
            gradient = gradient_of(model, images + delta, labels, loss)
            left = model(images + delta).argmax(1) == labels if early else torch.ones(len(images), dtype=torch.bool)
            if norm == "linf":
                moved = torch.clamp(delta + alpha * gradient.sign(), -eps, eps)
            else:
                moved = torch.renorm(delta + alpha * gradient / (lengths(gradient) + 1e-10), 2, 0, eps)
            moved = torch.max(torch.min(images + moved, high), low) - images
            delta = torch.where(left.view(-1, 1, 1, 1), moved, delta)
        values = loss(model(images + delta), labels, reduction="none").detach()
        best = torch.where((values >= most).view(-1, 1, 1, 1), delta, best)
        most = torch.maximum(most, values)
    return best.detach()


@pytest.mark.parametrize("engine", ENGINES)
def test_fast_adversarial(engine):
    model, images, _ = problem()
    mean, std = (torch.tensor(n).view(3, 1, 1) for n in (fast_adversarial.cifar10_mean, fast_adversarial.cifar10_std))
    images, low, high = (images - mean) / std, (0 - mean) / std, (1 - mean) / std
    labels = model(images).argmax(1)
    eps, alpha = 4 / 255 / std, 2 / 255 / std
    torch.manual_seed(2)
    starts = []
    for _ in range(2):
        noise = torch.zeros_like(images)
        for channel in range(3):
            noise[:, channel].uniform_(-float(eps[channel]), float(eps[channel]))
        starts.append(torch.max(torch.min(images + noise, high), low) - images)
    expected = locuslab_loop(model, images, labels, eps, alpha, 3, starts, low, high)
    torch.manual_seed(2)
    found = fast_adversarial.attack_pgd(model, images, labels, eps, alpha, 3, 2, engine=engine)
    assert_same_images(images + found, images + expected, images)
    with pytest.raises(NotImplementedError, match="opt"):
        fast_adversarial.attack_pgd(model, images, labels, eps, alpha, 3, 1, opt=object())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm, eps, alpha", [("l_inf", 0.03, 0.01), ("l_2", 0.8, 0.3)])
@pytest.mark.parametrize("early", [False, True])
def test_robust_overfitting(engine, norm, eps, alpha, early):
    model, images, labels = problem()
    mean, std = (
        torch.tensor(n).view(3, 1, 1) for n in (robust_overfitting.cifar10_mean, robust_overfitting.cifar10_std)
    )
    network = lambda x: model((x - mean) / std)  # noqa: E731
    labels = network(images).argmax(1)

    def start():
        if norm == "l_inf":
            noise = torch.zeros_like(images).uniform_(-eps, eps)
        else:
            noise = torch.zeros_like(images).normal_()
            noise = noise * (torch.zeros(6, 1, 1, 1).uniform_(0, 1) / lengths(noise) * eps)
        return (images + noise).clamp(0, 1) - images

    torch.manual_seed(2)
    starts = [start() for _ in range(2)]
    zero, one = torch.zeros(()), torch.ones(())
    kind = "linf" if norm == "l_inf" else "l2"
    expected = locuslab_loop(network, images, labels, eps, alpha, 3, starts, zero, one, kind, early)
    torch.manual_seed(2)
    found = robust_overfitting.attack_pgd(model, images, labels, eps, alpha, 3, 2, norm, early, engine=engine)
    assert_same_images(images + found, images + expected, images)


def test_robust_overfitting_with_mixup_in_train_mode_and_twice():
    model, images, labels = problem()
    other, part = labels.flip(0), 0.3
    given = {"mixup": True, "y_a": labels, "y_b": other, "lam": part}
    torch.manual_seed(2)
    found = robust_overfitting.attack_pgd(model, images, labels, 0.03, 0.01, 2, 1, "l_inf", **given, engine="eager")
    mean, std = (
        torch.tensor(n).view(3, 1, 1) for n in (robust_overfitting.cifar10_mean, robust_overfitting.cifar10_std)
    )

    def mixed(logits, labels, reduction="mean"):
        first, second = (F.cross_entropy(logits, y, reduction=reduction) for y in (labels, other))
        return part * first + (1 - part) * second

    torch.manual_seed(2)
    start = (images + torch.zeros_like(images).uniform_(-0.03, 0.03)).clamp(0, 1) - images
    ends = torch.zeros(()), torch.ones(())
    network = lambda x: model((x - mean) / std)  # noqa: E731
    expected = locuslab_loop(network, images, labels, 0.03, 0.01, 2, [start], *ends, early=False, loss=mixed)
    assert_same_images(images + found, images + expected, images)

    before = model.bn1.running_mean.clone()
    model.train()
    robust_overfitting.attack_pgd(model, images, labels, 0.03, 0.01, 2, 1, "l_inf")
    assert model.training and not torch.equal(model.bn1.running_mean, before)
    with pytest.raises(NotImplementedError, match="early_stop=True with mixup"):
        robust_overfitting.attack_pgd(model, images, labels, 0.03, 0.01, 2, 1, "l_inf", True, **given)
    with pytest.raises(ValueError, match="needs y_a"):
        robust_overfitting.attack_pgd(model, images, labels, 0.03, 0.01, 2, 1, "l_inf", mixup=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind, eps", [("linf", 0.03), ("l2", 0.5)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twins(engine, kind, eps, reduction):
    model, images, labels = problem()
    attack = FastGradientSignUntargeted(model, eps, 0.01, 0, 1, 3, kind, engine=engine)
    torch.manual_seed(3)
    found = attack.perturb(images, labels, reduction, random_start=True)
    assert model.training
    model.eval()
    torch.manual_seed(3)
    x = (images + torch.FloatTensor(images.shape).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(3):
        x = x + 0.01 * gradient_of(model, x, labels).sign()
        if kind == "linf":
            x = torch.max(torch.min(x, images + eps), images - eps)
        else:
            offset = x - images
            x = torch.where(lengths(offset) > eps, images + offset / lengths(offset) * eps, x)
        x = x.clamp(0, 1)
    assert_same_images(found, x, images)


def test_twins_attacks_the_head_of_the_pre_training():
    model, images, labels = problem()
    head = torch.nn.Linear(10, 7)
    model.forward_IN = lambda x: head(model(x))
    attack = FastGradientSignUntargeted(model, 0.03, 0.01, 0, 1, 2, engine="eager")
    found = attack.perturb_IN(images, labels)
    soft = attack.perturb(images, F.one_hot(labels, 7).float())
    model.eval()
    x = images
    for _ in range(2):
        x = x + 0.01 * gradient_of(model.forward_IN, x, labels).sign()
        x = torch.max(torch.min(x, images + 0.03), images - 0.03).clamp(0, 1)
    assert_same_images(found, x, images)
    assert_same_images(soft, x, images)
    with pytest.raises(ValueError, match="_type"):
        FastGradientSignUntargeted(model, 0.03, 0.01, 0, 1, 2, "l1")
