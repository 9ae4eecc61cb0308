"""What stands between convolutions: planned without PyTorch's autograd, and equal to eager."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from tests.attacks.engine.helpers import anew, assert_same_step, data, lively
from twins_fast import PGD, accelerate


class Layers(nn.Module):
    """Layers for the forwards below, on images of 3 x 8 x 8."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.narrow, self.wide, self.odd = nn.Conv2d(4, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 5, 3, padding=1)
        self.bn, self.bn16, self.bn13 = nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(13)
        self.c13, self.one = nn.Conv2d(13, 8, 1), nn.Conv2d(8, 1, 1)
        self.strided, self.grouped = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.scale = nn.Parameter(torch.linspace(-1, 2, 8).view(8, 1, 1))
        self.vector = nn.Parameter(torch.linspace(-1, 2, 8))
        self.frozen = FrozenBatchNorm2d(8)
        for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            getattr(self.frozen, name).uniform_(low, low + 1)
        self.hidden, self.head = nn.Linear(8 * 64, 8), nn.Linear(8, 10)
        self.head16 = nn.Linear(16, 10)
        self.norm1d = nn.BatchNorm1d(8).eval()
        self.norm1d.running_mean.uniform_(-1, 1)

    def top(self, x):
        return self.head(x.mean((2, 3)))

    def body(self, x):
        return self.c1(x).relu()


def gated(m, x):
    y = m.c2(m.body(x))
    y = y * m.c3(y.mean((2, 3), keepdim=True).relu()).sigmoid()
    return m.top((y + m.body(x)).relu())


def shuffled(x, groups):
    return x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def shuffle_unit(m, x):
    left, right = m.body(x).chunk(2, dim=1)
    x = shuffled(torch.cat([left, m.narrow(right)[:, :4].relu()], 1), 2)
    left, right = x.chunk(2, dim=1)
    return m.top(m.narrow(left) + m.narrow(right))


def res2net(m, x):
    parts = torch.split(m.body(x), 2, 1)
    outs = [parts[0]]
    for part in parts[1:]:
        outs.append((F.conv2d(outs[-1] + part, m.c2.weight[:2, :2], padding=1)).relu())
    return m.top(m.c3(torch.cat(outs, 1)))


def dense(m, x):
    x = m.body(x)
    for _ in range(2):
        x = torch.cat([x, m.odd(m.c2(x[:, :8]))], 1)[:, :13]
        x = m.c13(m.bn13(x).relu())
    return m.top(x)


def heads_in_the_batch(m, x):
    """Attention as of HaloNet, whose key is computed when the query is no longer batched."""
    y = m.body(x)
    query = m.c2(y).reshape(-1, 4, y[0, 0].numel()).transpose(1, 2)
    key = m.c3(y).reshape(-1, 4, y[0, 0].numel())
    values = (query @ key).softmax(-1) @ query
    return m.top(m.c2(y + values.transpose(1, 2).reshape(y.shape)))


def standardised(m, x):
    weight = m.c2.weight
    mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
    return m.top(F.conv2d(m.body(x), (weight - mean) / (var + 1e-5).sqrt(), m.c2.bias * 2, padding=1))


def reparametrised(m, x):
    """Kernels of 3 x 3, 1 x 1 and an identity as one, as RepVGG has them."""
    kernel = m.c2.weight + F.pad(m.c3.weight, (1, 1, 1, 1)) + F.pad(torch.eye(8)[:, :, None, None], (1, 1, 1, 1))
    return m.top(F.conv2d(m.body(x), kernel, m.c2.bias + m.c3.bias, padding=1).relu())


FORWARDS = {
    "a gate per channel, a sum and a ReLU": gated,
    "a gate per pixel": lambda m, x: m.top(m.c2(m.body(x)) * m.one(m.body(x)).sigmoid()),
    "a product of two": lambda m, x: m.top((m.c2(m.body(x)) * m.c3(m.body(x)).tanh()).relu()),
    "a square of the image": lambda m, x: m.top(m.c1(x * x * 3)),
    "a square": lambda m, x: m.top((lambda a: a * a)(m.c2(m.body(x)))),
    "a product that is gated": lambda m, x: m.top((lambda a: a * a.mean((2, 3), True) * a)(m.body(x))),
    "an expanded gate": lambda m, x: m.top((lambda a: a * a.mean((2, 3), True).sigmoid().expand_as(a))(m.body(x))),
    "a gate of vectors": lambda m, x: m.head((lambda v: v * v.sigmoid() * v)(m.body(x).mean((2, 3)))),
    "a concatenation": lambda m, x: m.top(m.wide(torch.cat([m.c2(m.body(x)), m.c3(m.body(x)).relu()], 1))),
    "a concatenation with norm": lambda m, x: m.top(
        m.wide(m.bn16(torch.cat([m.c2(m.body(x)), m.body(x)], 1)).relu())
    ),
    "a concatenation with itself": lambda m, x: m.top(m.wide(torch.cat([m.body(x)] * 2, 1).relu())),
    "a concatenation of one": lambda m, x: m.top(m.bn(torch.cat([m.body(x)], 1)).relu()),
    "a concatenation of vectors": lambda m, x: m.head16(
        torch.cat([m.body(x).mean((2, 3)), m.c2(m.body(x)).mean((2, 3))], 1)
    ),
    "channels that fill no bytes": lambda m, x: m.top(
        m.c13(m.bn13(torch.cat([m.odd(m.body(x)), m.body(x)], -3)).relu())
    ),
    "a dense block": dense,
    "halves": lambda m, x: m.top((lambda a, b: m.narrow(a) + m.narrow(b).relu())(*m.c2(m.body(x)).chunk(2, 1))),
    "slices that overlap": lambda m, x: m.top((lambda a: m.narrow(a[:, :4]) + m.narrow(a[:, 2:6]))(m.body(x))),
    "every other channel": lambda m, x: m.top((lambda a: m.narrow(a[:, 1::2]) + a)(m.body(x))),
    "the last channels": lambda m, x: m.top(m.narrow(m.body(x)[:, -4:].relu())),
    "parts in a chain": res2net,
    "a shuffle": lambda m, x: m.top(m.c2(shuffled(m.c2(m.body(x)), 4)).sigmoid()),
    "a shuffle of a concatenation": lambda m, x: m.top(
        m.c13(shuffled(torch.cat([m.body(x), m.odd(m.body(x))], 1), 1).relu())
    ),
    "a unit of ShuffleNet": shuffle_unit,
    "a mean that counts padding": lambda m, x: m.top(m.c2(F.avg_pool2d(m.body(x), 3, 1, 1))),
    "a mean that does not": lambda m, x: m.top(m.c2(F.avg_pool2d(m.body(x), 3, 2, 1, count_include_pad=False))),
    "a mean of windows that stick out": lambda m, x: m.top(m.c2(F.avg_pool2d(m.body(x), 3, 2, ceil_mode=True))),
    "a mean with a divisor": lambda m, x: m.top(m.c2(F.avg_pool2d(m.body(x), 2, divisor_override=3))),
    "means of unequal windows": lambda m, x: m.top(m.c2(F.adaptive_avg_pool2d(m.body(x), (3, 5)))),
    "more means than pixels": lambda m, x: m.top(m.c2(F.adaptive_avg_pool2d(m.body(x), 11))),
    "a maximum of windows that stick out": lambda m, x: m.top(
        m.c2(F.max_pool2d(m.body(x), 3, 2, ceil_mode=True))
    ),
    "the largest of all": lambda m, x: m.top(F.adaptive_max_pool2d(m.body(x), 1)),
    "upsampling inside": lambda m, x: m.top(m.c2(F.interpolate(m.strided(m.body(x)), scale_factor=3.0)).relu()),
    "upsampling by no whole number": lambda m, x: m.top(m.c2(F.interpolate(m.body(x), size=(11, 13)).relu())),
    "a flattened image": lambda m, x: m.head(m.hidden(m.body(x).flatten(1)).relu()),
    "a viewed image": lambda m, x: m.head(m.hidden(m.body(x).view(x.size(0), -1)).relu()),
    "padding in front of a convolution": lambda m, x: m.top(m.strided(F.pad(m.body(x), (0, 1, 0, 1)))),
    "padding that is larger in front": lambda m, x: m.top(F.conv2d(F.pad(m.body(x), (2, 0, 3, 0)), m.c2.weight)),
    "padding in front of groups": lambda m, x: m.top(m.grouped(F.pad(m.body(x), (0, 1, 1, 2)))),
    "padding that is read twice": lambda m, x: m.top((lambda a: m.c2(a) + a)(F.pad(m.body(x), (1, 1, 1, 2)))),
    "padding that cuts off": lambda m, x: m.top(m.c2(F.pad(m.body(x), (-1, 1, -2, 1)))),
    "every other row": lambda m, x: m.top(m.c2(m.body(x)[:, :, 1::2, :-3])),
    "pixels beside each other": lambda m, x: m.top(
        m.wide(torch.cat([m.body(x)[..., ::2, ::2], m.body(x)[..., 1::2, 1::2]], 1)).relu()
    ),
    "pixels of the image": lambda m, x: m.top(m.c1(x)[..., ::2, 1:] + m.c1(x[..., ::2, 1:])),
    "padding of the image": lambda m, x: m.top(F.conv2d(F.pad(x, (0, 1, 0, 1)), m.c1.weight, stride=2).relu()),
    "padding that keeps the size": lambda m, x: m.top(F.conv2d(m.body(x), m.c2.weight, padding="same", dilation=2)),
    "a factor and a sum": lambda m, x: m.top((m.c2(m.body(x)) * 0.2 + m.body(x)).relu()),
    "one minus": lambda m, x: m.top((1 - m.c2(m.body(x)) / 2 - 0.3).relu() - 3),
    "a difference": lambda m, x: m.top((lambda a: a + m.scale * (m.bn(a) - m.c2(a)))(m.body(x))),
    "a scale per channel": lambda m, x: m.top((m.scale * m.bn(m.c2(m.body(x))) + m.scale / 2).relu()),
    "a scale of vectors": lambda m, x: m.head((m.body(x).mean((2, 3)) * m.vector + 1).relu()),
    "a norm of vectors": lambda m, x: m.head(m.norm1d(m.body(x).mean((2, 3)))),
    "a frozen batch norm": lambda m, x: m.top(m.frozen(m.c2(m.body(x))).relu()),
    "weights that are standardised": standardised,
    "weights of several kernels": reparametrised,
    "a chain of sums": lambda m, x: m.top((lambda a: 0 + m.c2(a) + m.c3(a) + a + m.bn(a))(m.body(x)).relu()),
}  # fmt: skip


def network(name):
    torch.manual_seed(0)
    return lively(type("Forwarded", (Layers,), {"forward": FORWARDS[name]})(), size=8)


def gradient(network, x, direction):
    leaf = x.clone().requires_grad_()
    logits = network(leaf).float()
    return logits.detach(), torch.autograd.grad((logits * direction).sum(), leaf)[0]


def autograd_layers(model, x):
    return [layer["op"] for layer in anew(model, engine="plan").explain(x).layers if "autograd" in layer["runs"]]


@pytest.mark.parametrize("name", FORWARDS)
def test_planned_and_equal_to_eager(name):
    model, (x, y) = network(name), data(5, 8, classes=8)
    assert autograd_layers(model, x) == []
    direction = torch.randn(model(x).shape)
    (logits, found), (expected, wanted) = (gradient(f, x, direction) for f in (accelerate(model), model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert_same_step(model, x, y)


HALF = [
    "a gate per channel, a sum and a ReLU", "a gate per pixel", "a product of two", "a concatenation with norm",
    "channels that fill no bytes", "a unit of ShuffleNet", "parts in a chain", "a mean that counts padding",
    "padding in front of groups", "a flattened image", "weights that are standardised",
]  # fmt: skip


@pytest.mark.parametrize("name", HALF)
def test_in_half_precision(name):
    """About as near to float32 as PyTorch's own, for most images: roundoff puts a ReLU of some on its other side."""
    model, (x, _) = network(name), data(9, 8)
    direction = torch.randn(model(x).shape)
    _, wanted = gradient(model, x, direction)

    def error(network):
        difference = gradient(network, x, direction)[1] - wanted
        return (difference.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).median()

    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            usual = error(model)
        assert error(accelerate(model, dtype)) <= 1.6 * usual + 0.03, dtype


def test_what_is_derived_of_parameters_follows_them():
    model, (x, y) = network("weights that are standardised"), data(4, 8)
    attack = PGD(model, engine="plan", steps=1, random_start=False)
    before = attack(x, y)
    with torch.no_grad():
        model.c2.weight.copy_(model.c2.weight.flip(0, 2))
    after = attack(x, y)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(model, engine="plan", steps=1, random_start=False)(x, y))


@pytest.mark.parametrize("parametrised", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrised_weights(parametrised):
    model, (x, y) = network("a concatenation"), data(4, 8)
    parametrised(model.c2)
    model.eval()
    assert autograd_layers(model, x) == []
    assert_same_step(model, x, y)


@pytest.mark.parametrize("name", ["a gate per channel, a sum and a ReLU", "a square of the image", "a dense block"])
def test_factors_outlive_other_forward_passes(name):
    assert_outlives(network(name))


def test_what_a_segment_reads_of_the_image_outlives_other_forward_passes():
    torch.manual_seed(0)
    forward = {"forward": lambda m, x: m.top(m.c1(F.softplus(x * 5) ** 2))}
    assert_outlives(lively(type("Forwarded", (Layers,), forward)(), size=8))


def assert_outlives(model):
    """Another batch goes forward before the first one's backward pass."""
    x, _ = data(6, 8)
    fast, leaf = accelerate(model), x[:3].clone().requires_grad_()
    logits = fast(leaf)
    fast(x[3:].clone().requires_grad_())
    (found,) = torch.autograd.grad(logits.sum(), leaf)
    _, wanted = gradient(model, x[:3], torch.ones_like(logits))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_what_is_not_of_these_kinds_is_left_to_pytorch():
    forwards = {
        "reflected": lambda m, x: m.top(m.c2(F.pad(m.body(x), (1, 1, 1, 1), mode="reflect"))),
        "an outer product": lambda m, x: m.top(m.body(x).mean(2, True) * m.body(x).mean(3, True)),
        "rows side by side": lambda m, x: m.top(m.c2(torch.cat([m.body(x), m.body(x)], 2))),
        "of the image": lambda m, x: m.top(m.c1(F.softplus(x) ** 2)),
        "heads in the batch": heads_in_the_batch,
    }
    x, y = data(4, 8)
    for name, forward in forwards.items():
        torch.manual_seed(0)
        model = lively(type("Forwarded", (Layers,), {"forward": forward})(), size=8)
        assert autograd_layers(model, x), name
        assert_same_step(model, x, y)
