"""The losses of TRADES, MART and AWP against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.compat.problem import assert_same_images, lengths, problem
from twins_fast.compat.trades import AdvWeightPerturb, TradesAWP, mart_loss, perturb_input, trades_loss


def attacked(model, images, labels, step_size, epsilon, steps, distance, divergence):
    """From a start of little noise, in eval mode."""
    model.eval()
    x = images + 0.001 * torch.randn(images.shape)
    clean = F.softmax(model(images), 1).detach()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        if divergence:
            loss = F.kl_div(F.log_softmax(model(x), 1), clean, reduction="sum")
        else:
            loss = F.cross_entropy(model(x), labels)
        (gradient,) = torch.autograd.grad(loss, x)
        if distance == "l_inf":
            x = x.detach() + step_size * gradient.sign()
            x = torch.min(torch.max(x, images - epsilon), images + epsilon).clamp(0, 1)
        else:
            x = x.detach() + 2 * epsilon / steps * gradient / lengths(gradient)
            x = images + torch.renorm(x.clamp(0, 1) - images, 2, 0, epsilon)
    model.train()
    return x.clamp(0, 1).detach()


def losses(function, formula, **options):
    """Loss, gradients and running statistics, by the adapter and by the formula."""
    results = []
    for run in (function, formula):
        model, images, labels = problem()
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)  # which has to be dropped
        torch.manual_seed(1)
        loss = run(model, images, labels, optimizer, **options)
        loss.backward()
        assert model.training
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients, model.bn1.running_mean.clone()))
    return zip(*results, strict=True)


@pytest.mark.parametrize("distance, epsilon", [("l_inf", 0.031), ("l_2", 0.5)])
def test_trades(distance, epsilon):
    def formula(model, images, labels, optimizer, engine):
        x = attacked(model, images, labels, 0.007, epsilon, 3, distance, True)
        optimizer.zero_grad()
        logits = model(images)
        divergence = F.kl_div(F.log_softmax(model(x), 1), F.softmax(model(images), 1), reduction="sum")
        return F.cross_entropy(logits, labels) + 6 / len(x) * divergence

    def adapter(*arguments, engine):
        return trades_loss(*arguments, 0.007, epsilon, 3, 6.0, distance, engine=engine)

    for found, expected in losses(adapter, formula, engine="eager"):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for found, expected in losses(adapter, formula, engine="plan"):
        assert (found - expected).norm() < 0.1 * expected.norm()  # signs of the first gradients are those of roundoff


@pytest.mark.parametrize("distance, epsilon", [("l_inf", 0.031), ("l_2", 0.5)])
def test_images_of_trades(distance, epsilon):
    model, images, labels = problem()
    torch.manual_seed(1)
    expected = attacked(model, images, labels, 0.007, epsilon, 3, distance, True)
    torch.manual_seed(1)
    found = perturb_input(model.train(), images, 0.007, epsilon, 3, distance, engine="eager")
    assert_same_images(found, expected, images)
    assert not model.training


def test_mart():
    def formula(model, images, labels, optimizer):
        x = attacked(model, images, labels, 0.007, 0.031, 3, "l_inf", False)
        optimizer.zero_grad()
        clean, adversarial = F.softmax(model(images), 1), model(x)
        probabilities = F.softmax(adversarial, 1)
        others = torch.topk(probabilities, 2).indices
        rival = torch.where(others[:, 0] == labels, others[:, 1], others[:, 0])
        boosted = F.cross_entropy(adversarial, labels)
        boosted += F.nll_loss(torch.log(1.0001 - probabilities + 1e-12), rival)
        divergence = (clean * (clean.log() - (probabilities + 1e-12).log())).sum(1)
        own = clean.gather(1, labels[:, None])[:, 0]
        return boosted + 5.0 / len(x) * (divergence * (1.0000001 - own)).sum()

    for found, expected in losses(lambda *a: mart_loss(*a, perturb_steps=3, beta=5.0, engine="eager"), formula):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_distances_with_which_the_originals_do_not_attack():
    model, images, labels = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for function, distance in ((trades_loss, "l_1"), (mart_loss, "l_2")):
        with pytest.raises(NotImplementedError, match=f"distance='{distance}'"):
            function(model, images, labels, optimizer, distance=distance)


@pytest.mark.parametrize("kind", [AdvWeightPerturb, TradesAWP])
def test_adversarial_weight_perturbation(kind):
    model, images, labels = problem()
    other = images.flip(0)
    model.train()
    proxy = copy.deepcopy(model)
    for parameter in proxy.parameters():
        torch.nn.init.zeros_(parameter)
    before = {name: value.clone() for name, value in model.named_parameters()}
    awp = kind(model, proxy, torch.optim.SGD(proxy.parameters(), 0.01), gamma=0.01)
    clean = {"inputs_clean": other, "beta": 6.0} if kind is TradesAWP else {}
    moves = awp.calc_awp(inputs_adv=images, targets=labels, **clean)
    again = copy.deepcopy(model)
    if kind is TradesAWP:
        natural = again(other)
        loss = F.cross_entropy(natural, labels)
        loss += 6 / len(images) * F.kl_div(F.log_softmax(again(images), 1), F.softmax(natural, 1), reduction="sum")
    else:
        loss = F.cross_entropy(again(images), labels)
    loss.backward()
    gradients = {
        name: value.grad for name, value in again.named_parameters() if value.dim() > 1 and value.grad is not None
    }
    for name, gradient in gradients.items():
        expected = before[name].norm() * gradient / gradient.norm()
        torch.testing.assert_close(moves[name], expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())
    awp.perturb(moves)
    moved = dict(model.named_parameters())
    for name in gradients:
        torch.testing.assert_close(
            (moved[name] - before[name]).norm() / before[name].norm(), torch.tensor(0.01), rtol=1e-2, atol=0
        )
    awp.restore(moves)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
