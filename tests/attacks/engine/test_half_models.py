"""Models of half precision are planned as their float32 copies are under autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import assert_untouched, data, net, program_of, small, state_of
from twins_fast import PGD, accelerate
from twins_fast.attacks.engine.watch import obstacle

HALVES = [torch.float16, torch.bfloat16]
START = {"random_start": False, "steps": 3}


def attending(m, x):
    tokens = m.c2(m.c1(x).relu()).flatten(2).transpose(1, 2)
    weights = (tokens @ tokens.transpose(1, 2)).softmax(-1)
    return m.head(F.layer_norm(weights @ tokens, (8,)).mean(1))


def with_an_attribute(m, x):
    return m.top(m.c2(m.c1(x).relu()) * m.number)


def tied():
    model = net(lambda m, x: m.top(m.c3(m.c2(m.c1(x).relu()).relu())))
    model.c3 = nn.Conv2d(8, 8, 3, padding=1)
    model.c3.weight = model.c2.weight
    return model


def with_spectral_norm():
    model = net(lambda m, x: m.top(m.c2(m.c1(x).relu())))
    nn.utils.parametrizations.spectral_norm(model.c2)
    return model


def with_norms_in_float32(dtype):
    model = small().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


MODELS = {
    "batch norms": small,
    "attention": lambda: net(attending),
    "an attribute": lambda: net(with_an_attribute),
    "tied weights": tied,
    "spectral norm": with_spectral_norm,
}


def in_half(name, dtype):
    model = MODELS[name]().eval().to(dtype)
    if name == "an attribute":
        model.number = torch.tensor(0.7, dtype=dtype)
    return model


def in_float32(model):
    copied = copy.deepcopy(model).float()
    if hasattr(copied, "number"):
        copied.number = copied.number.float()
    return copied


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_attack_is_that_on_the_float32_copy_under_autocast(name, dtype):
    model, (x, y) = in_half(name, dtype), data(3, 8)
    before, tensors = state_of(model), [id(t) for t in model.state_dict(keep_vars=True).values()]
    x = x.to(dtype)
    adversarial = PGD(model, engine="plan", **START)(x, y)
    assert_untouched(model, before)
    assert [id(t) for t in model.state_dict(keep_vars=True).values()] == tensors
    expected = PGD(in_float32(model), engine="plan", amp_dtype=dtype, **START)(x.float(), y)
    assert adversarial.dtype == dtype and torch.equal(adversarial, expected.to(dtype))
    assert (adversarial != x).float().mean() > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl", "random_start": "normal"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
        {"early_stop": True},
        {"norm": "l2", "eps": 0.5, "restarts": 2, "random_start": True},
        {"loss": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")},
    ],
    ids=["kl", "normalised", "early stop", "l2", "a loss of one's own"],
)
def test_with_every_kind_of_option_the_images_stay_in_their_type_and_range(options):
    model, x = small().half(), data(4)[0].half()
    y = model(x if "mean" not in options else (x - 0.5) / 0.2).argmax(1)
    if "mean" in options:
        x = (x - 0.5) / 0.2
    adversarial = PGD(model, engine="plan", **START | options)(x, y)
    eager = PGD(model, engine="eager", **START | options)(x, y)
    assert adversarial.dtype == eager.dtype == torch.float16
    low, high = (eager.min().item(), eager.max().item())
    assert low - 1e-2 <= adversarial.min() and adversarial.max() <= high + 1e-2
    assert not torch.equal(adversarial, x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_changed_weight_counts_from_the_next_attack_on(dtype):
    model, (x, y) = small().to(dtype), data(3)
    x, attack = x.to(dtype), PGD(model, engine="plan", **START)
    first, program = attack(x, y), attack._program(x)
    with torch.no_grad():
        model.conv1.weight.mul_(-1)
    second = attack(x, y)
    assert attack._program(x) is program and not torch.equal(first, second)
    expected = PGD(model.float(), engine="plan", amp_dtype=dtype, **START)(x.float(), y)
    assert torch.equal(second, expected.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norms_may_be_in_float32(dtype):
    model, (x, y) = with_norms_in_float32(dtype), data(3)
    x = x.to(dtype)
    adversarial = PGD(model, engine="plan", **START)(x, y)
    expected = PGD(copy.deepcopy(model).float(), engine="plan", amp_dtype=dtype, **START)(x.float(), y)
    assert torch.equal(adversarial, expected.to(dtype))


def test_a_function_of_a_half_network_is_planned():
    model, (x, y) = small().half(), data(3)
    x = x.half()
    adversarial = PGD(lambda images: model(images) * 2, engine="plan", **START)(x, y)
    expected = PGD(model, engine="plan", **START)(x, y)
    assert (adversarial == expected).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_accelerated_network_gives_logits_and_gradients_of_its_type(dtype):
    model, (x, _) = small().to(dtype), data(3)
    network, wide = accelerate(model), accelerate(copy.deepcopy(model).float(), dtype)
    leaf, other = x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()
    logits, expected = network(leaf), wide(other)
    assert logits.dtype == dtype and torch.equal(logits, expected.to(dtype))
    logits.float().square().sum().backward()
    expected.to(dtype).float().square().sum().backward()
    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, other.grad.to(dtype))
    with torch.no_grad():
        assert torch.equal(network(leaf), logits)
    assert network.explain(leaf).engine == "plan"


def test_where_the_plan_fails_in_the_backward_pass_the_model_gives_the_gradient(monkeypatch):
    model, (x, _) = small().half(), data(2)
    network, leaf = accelerate(model), x.half().requires_grad_()
    logits = network(leaf)

    def failing(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(program_of(PGD(model), leaf.detach()), "backward", failing)
    with pytest.warns(UserWarning, match="no luck"):
        (gradient,) = torch.autograd.grad(logits.float().sum(), leaf)
    (expected,) = torch.autograd.grad(model(leaf).float().sum(), leaf)
    assert gradient.dtype == torch.float16 and torch.equal(gradient, expected)


class Keeping(nn.Module):
    """Keeps from its first call what later ones need."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.kept = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.conv.weight.detach().abs().mean()
        return self.head(self.conv(x).relu().mean((2, 3)) * self.kept)


def test_what_a_model_keeps_from_its_first_call_is_of_its_own_type():
    model, (x, y) = Keeping().half().eval(), data(3, 8)
    x = x.half()
    adversarial = PGD(model, engine="plan", **START)(x, y)
    assert model.kept.dtype == model(x).dtype == torch.float16
    assert (adversarial != x).float().mean() > 0.5


def test_explanations_with_times():
    model, x = small().half(), data(3)[0].half()
    assert "ms" in str(PGD(model, engine="plan").explain(x, timed=True))
    assert accelerate(model).explain(x).engine == "plan"


def test_a_failed_capture_leaves_the_model_in_half_precision():
    model = net(lambda m, x: m.top(m.c1(x)) if x.sum() > 0 else m.top(m.c1(-x))).half()
    before = state_of(model)
    report = PGD(model).explain(data(2, 8)[0].half())
    assert report.engine == "eager" and "data-dependent" in report.reason
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        (torch.float16, torch.float32, "conv1.weight is torch.float16 and the images are torch.float32"),
        (torch.float32, torch.float16, "the model is torch.float32 and the images are torch.float16"),
        (torch.float16, torch.bfloat16, "conv1.weight is torch.float16 and the images are torch.bfloat16"),
        (torch.float64, torch.float64, "the images are torch.float64: a plan computes in float32 and half precision"),
    ],
    ids=str,
)
def test_other_types_and_mixtures_are_refused_with_a_reason(model, images, words):
    assert words in obstacle(small().to(model), data(2)[0].to(images))


@pytest.mark.filterwarnings("ignore:.*convert one of them")
def test_what_pytorch_says_of_a_mixture_is_raised():
    x, y = data(3)
    with pytest.raises(RuntimeError, match="type"):
        PGD(small().half(), **START)(x, y)
