"""A plan computes what the eager attack does."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.profiler import profile
from torchvision.models.resnet import Bottleneck

from bench import networks
from tests.attacks.engine.helpers import (
    STEP,
    Doubled,
    anew,
    assert_same_step,
    data,
    few_at_once,
    lively,
    loss_of,
    program_of,
    small,
    ten_steps,
)
from twins_fast import PGD, accelerate, convert_twin_bn, fuse_twin_bn, fusion_report
from twins_fast.attacks.engine import cache, program
from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.checkpoints import load_pretrained, read_state_dict
from twins_fast.models import TransferResNet, build_model
from twins_fast.ops import native
from twins_fast.train import assets


def timm_model(name):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10)


TV = torchvision.models


ARCHITECTURES = {
    "resnet18": (lambda: TV.resnet18(num_classes=10), 64, set()),
    "resnet50": (lambda: TV.resnet50(num_classes=10), 64, set()),
    "wide_resnet50_2": (lambda: TV.wide_resnet50_2(num_classes=10), 64, set()),
    "resnext50": (lambda: TV.resnext50_32x4d(num_classes=10), 64, set()),
    "densenet121": (lambda: TV.densenet121(num_classes=10), 64, set()),
    "vgg16_bn": (lambda: TV.vgg16_bn(num_classes=10), 32, set()),
    "mobilenet_v2": (lambda: TV.mobilenet_v2(num_classes=10), 64, set()),
    "timm resnet26": (lambda: timm_model("resnet26"), 64, set()),
    "timm efficientnet_b0": (lambda: timm_model("efficientnet_b0"), 64, set()),
    "preact_resnet18": (lambda: networks.preact_resnet18(10), 32, set()),
    "wrn_28_10": (lambda: networks.wide_resnet(28, 10, 10), 32, set()),
    "cifar_resnet18": (lambda: networks.cifar_resnet18(10), 32, set()),
    "vit_b_16": (lambda: TV.vit_b_16(num_classes=10, image_size=64), 64, None),
    "convnext_tiny": (lambda: TV.convnext_tiny(num_classes=10), 64, None),
    "resnet50 of upsampled images": (lambda: build_model("resnet50", 10, upsample=112), 16, set()),
}


LARGE = {"wrn_28_10", "densenet121", "vit_b_16", "wide_resnet50_2", "vgg16_bn", "convnext_tiny", "resnext50"}
LARGE |= {"resnet50 of upsampled images", "resnet50"}


def large(names):
    """Those of :data:`LARGE` only with the long proofs."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in names]


@pytest.mark.parametrize("name", large(ARCHITECTURES))
def test_architecture_takes_the_plan_and_equals_eager(name):
    build, size, left = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = lively(build(), size=size)
    x, y = data(2, size)
    assert_same_step(model, x, y)
    # A small ball: a deep random network magnifies what ten steps make of one roundoff, a trained one does not.
    losses = ten_steps(model, x, y, eps=1 / 255, alpha=0.25 / 255)
    assert losses["plan"] == pytest.approx(losses["eager"], abs=1e-4)
    report = PGD(model, engine="plan").explain(x)  # by itself it may find that so few images do not pay
    assert report.engine == "plan"
    by_pytorch = {layer["op"] for layer in report.layers if "not planned" in layer["runs"]}
    if left is None:  # many operations; how they are named depends on PyTorch's version
        planned = {layer["op"] for layer in report.layers} - by_pytorch
        assert any(" 3->" in op for op in planned) and any(op.endswith("->10") for op in planned)
    else:
        assert by_pytorch == left


@pytest.mark.skipif(native._C is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", large(["resnet50", "cifar_resnet18", "resnet50 of upsampled images"]))
def test_convolutions_of_a_matrix_unit(name, monkeypatch):
    """Where the C++ kernels do not use it they are oneDNN's; here with vectors, and in float32, to compare them."""
    monkeypatch.setattr("twins_fast.attacks.engine.executors.cpu.has_matrix_unit", lambda dtype: True)
    build, size, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = lively(build(), size=size)
    x, y = data(2, size)
    assert_same_step(model, x, y)
    runs = {layer["op"].split(" + ")[0]: layer["runs"] for layer in PGD(model).explain(x).layers}
    inner = {op: run for op, run in runs.items() if op[0] in "13" and not op.endswith("->10")}
    first = "3x3 3->64"
    assert len(inner) > 5 and all(run == ("C++ gemm" if op == first else "oneDNN") for op, run in inner.items())


@pytest.mark.skipif(native._C is None, reason="no compiled kernels")
def test_groups_have_kernels_of_their_own():
    torch.manual_seed(0)
    model = lively(Grouped(), size=16)
    x, y = data(2, 16)
    assert_same_step(model, x, y)
    layers = PGD(model).explain(x).layers
    grouped = [layer for layer in layers if " groups " in layer["op"]]
    assert len(grouped) == 5 and all(layer["runs"] == "C++ direct" for layer in grouped)
    assert [layer["op"].partition(" + ")[2] for layer in grouped[-2:]] == [
        "folded batch norm + ReLU",
        "folded batch norm + sum + ReLU",
    ]


def test_a_robust_network_on_real_images():
    robust = build_model("cifar-resnet18-w16", 5)
    load_pretrained(robust, read_state_dict(assets.NETWORK))
    nn.init.normal_(robust.fc_downstream.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(assets.read_images()[0][:64]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        y = robust.eval()(x).argmax(1)
    assert_same_step(robust, x, y)
    losses = ten_steps(robust, x, y)
    assert losses["plan"] == pytest.approx(losses["eager"], abs=1e-4) and losses["plan"] > loss_of(robust, x, y) + 0.1


class Residuals(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.halving = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu, self.softplus, self.up = nn.ReLU(), nn.Softplus(), nn.Upsample(scale_factor=2.0)
        self.head = nn.Linear(8, 10)


class AfterASegment(Residuals):
    def forward(self, x):
        x = self.softplus(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(y)) + x
        return self.head(x.mean((2, 3)))


class AsInHRNet(Residuals):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + self.up(self.bn3(self.halving(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "fused", "by_pytorch"),
    [
        (AfterASegment, ["", "relu", "add"], {"softplus"}),
        (AsInHRNet, ["relu", "add+relu", ""], set()),
    ],
)
def test_fused_two_wing_layers_whose_residual_is_not_planned(network, fused, by_pytorch):
    torch.manual_seed(0)
    model = fuse_twin_bn(convert_twin_bn(lively(network(), size=8))).eval()
    assert [row.fused for row in fusion_report(model)] == fused
    x, y = data(3, 8)
    assert_same_step(model, x, y)
    assert {layer["op"] for layer in PGD(model).explain(x).layers if "not planned" in layer["runs"]} == by_pytorch


class Tokens(nn.Module):
    """What transformers, mixers and ConvNeXts are made of; ``arrange`` says how the tokens are."""

    def __init__(self, arrange, channels=12, size=4):
        super().__init__()
        self.stem, self.arrange = nn.Conv2d(3, channels, 2, stride=2), arrange
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels, elementwise_affine=False)
        self.wide, self.narrow = nn.Linear(channels, 20), nn.Linear(20, channels, bias=False)
        self.mix, self.qkv = nn.Linear(size * size, size * size), nn.Linear(channels, 3 * channels)
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)
        self.image_gain = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.first = nn.Parameter(torch.randn(1, 1, channels))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(self.arrange(self, self.stem(x)))

    def perceptron(self, x):
        return self.narrow(F.gelu(self.wide(x)))


def _transformer(net, x):
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([net.first.expand(x.shape[0], -1, -1), x], 1)
    for _ in range(2):
        q, k, v = net.qkv(net.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + y
        x = x + net.gain * net.perceptron(net.norm2(x))
    return net.norm1(x)[:, 0]


def _mixer(net, x):
    x = x.flatten(2).transpose(1, 2)
    x = x + net.mix(net.norm1(x).transpose(1, 2)).transpose(1, 2)
    return (x + 0.5 * net.perceptron(net.norm2(x))).mean(1)


def _convnext(net, x):
    y = net.perceptron(net.norm1(net.depthwise(x).permute(0, 2, 3, 1)))
    x = x + net.image_gain * y.permute(0, 3, 1, 2)
    return net.norm2(x.mean((2, 3)))


def _windows(net, x):
    x = net.norm1(x.permute(0, 2, 3, 1))
    mask = x.new_zeros(4, 4)
    mask[:2, 1:] = 1
    y = (torch.roll(x, 1, 1) * mask[..., None]).reshape(-1, 2, 8, x.shape[-1]).flatten(1, 2)
    x = x.flatten(1, 2) + net.perceptron(y)
    return net.norm2(x.unflatten(1, (4, 4)).permute(0, 3, 1, 2).permute(0, 2, 3, 1)).mean((1, 2))


def _local(net, x):
    """Tokens that are an image in between."""
    x = net.norm1(x.flatten(2).transpose(1, 2))
    y = net.depthwise(x.transpose(1, 2).reshape(x.shape[0], -1, 4, 4)).flatten(2).transpose(1, 2)
    x = net.norm2(x + net.gain * y).transpose(1, 2).reshape(x.shape[0], -1, 4, 4)
    return F.max_pool2d(x, 2).flatten(2).transpose(1, 2).mean(1) + x.mean((2, 3))


def _norm_of_the_image(net, x):
    return net.norm1(F.relu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu().mean((2, 3))


def _both_ways(net, x):
    """A linear layer over the columns of an image, which lie apart in memory."""
    return net.mix(x.repeat_interleave(4, 3) + 1).mean((2, 3)) + net.norm1(x.mean((2, 3)))


def _image_as_tokens(net, x):
    """An activation of a convolution's result, which it sees in another shape."""
    return net.norm1(F.gelu(net.depthwise(x).flatten(2).transpose(1, 2))).mean(1)


def _nothing_and_the_rest(net, x):
    """As where positions are turned that some tokens do not have."""
    x = net.depthwise(x)
    return net.norm1(torch.cat([x[:, :, :0], x[:, :, 0:].flip(2)], 2).mean((2, 3)))


def _scale_that_is_ignored(net, x):
    """The gradient of the first one's scale is a sum of which nothing but roundoff is left."""
    x = 1e4 * x
    for _ in range(2):
        x = x * (x.pow(2).mean(1, keepdim=True) + 1e-8).rsqrt()
    return net.norm1(x.permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize(
    ("arrange", "left"),
    [
        (_transformer, None),
        (_mixer, {"transpose", "transpose, add"}),
        (_convnext, set()),
        (_windows, None),
        (_local, set()),
        (_norm_of_the_image, set()),
        (_both_ways, None),
        (_image_as_tokens, set()),
        (_nothing_and_the_rest, None),
        (_scale_that_is_ignored, None),
    ],
)
@pytest.mark.parametrize("executor", [cache.executor_for, pytest.param(TorchExecutor, marks=pytest.mark.slow)])
def test_layer_norms_and_linear_layers_on_tokens(arrange, left, executor, monkeypatch):
    monkeypatch.setattr(cache, "executor_for", executor)
    torch.manual_seed(0)
    model = lively(Tokens(arrange), size=8)
    x, y = data(3, 8, 5)
    assert_same_step(model, x, y)
    losses = {dtype: loss_of(model, anew(model, engine="plan", amp_dtype=dtype)(x, y), y) for dtype in HALVES}
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.05)
    layers = PGD(model).explain(x).layers
    assert any(layer["op"] == "layer norm" for layer in layers)
    if left is not None:
        assert {layer["op"] for layer in layers if "not planned" in layer["runs"]} == left


class Attentive(nn.Module):
    """PyTorch's own attention, which projects [T, N, C] whatever it is given."""

    def __init__(self):
        super().__init__()
        self.stem, self.attend = nn.Conv2d(3, 16, 3), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def test_linear_layers_of_transposed_rows_are_one_product():
    torch.manual_seed(0)
    model = Attentive().eval()
    x, y = data(3, 8, 5)
    assert_same_step(model, x, y)
    attack = anew(model, engine="plan")
    attack(x, y)
    with profile() as recorded:
        attack(x, y)
    names = {event.key for event in recorded.key_averages()}
    assert "aten::addmm" in names and "aten::bmm" not in names


class Recurrent(nn.Module):
    """Columns of an image one after the other."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.recurrent = kind(16, 8, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean(2).transpose(1, 2)
        return self.head(self.recurrent(x)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_segments(kind):
    torch.manual_seed(0)
    model, (x, y) = lively(Recurrent(kind), size=8), data(3, 8, 5)
    assert_same_step(model, x, y)
    model.recurrent.weight_hh_l0 = nn.Parameter(torch.randn_like(model.recurrent.weight_hh_l0))
    assert_same_step(model, x, y)
    (segment,) = (layer for layer in PGD(model).explain(x).layers if "not planned" in layer["runs"])
    assert kind.__name__.lower() in segment["op"]


class InFloat32(nn.Module):
    """A part that bfloat16 would round to nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            x = (x.float() + 4096) @ torch.eye(x.shape[-1]) - 4096
        return self.head(x.relu().mean((2, 3)))


def test_a_part_without_autocast_is_computed_in_float32():
    torch.manual_seed(0)
    model = InFloat32().eval()
    x, y = data(3, 8, 5)
    assert_same_step(model, x, y)
    half = accelerate(model, torch.bfloat16)
    assert half.explain(x).engine == "plan"
    with torch.no_grad():
        logits = model(x)
        assert (half(x) - logits).norm() <= 0.05 * (logits - model.head.bias).norm()

    class Inside(InFloat32):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    assert "autocast inside" in PGD(Inside()).explain(x).reason


HALVES = (None, torch.bfloat16, torch.float16)


def test_images_of_more_channels_than_the_kernels_take():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(300, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    assert_same_step(model, torch.rand(2, 300, 8, 8), torch.tensor([0, 1]))


def test_everything_around_convolutions_is_fused():
    report = PGD(small()).explain(data()[0])
    assert all(layer["op"].startswith(("3x3", "1x1", "mean")) for layer in report.layers)
    assert sum("sum + ReLU" in layer["op"] for layer in report.layers) == 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_attacks_as_well(half):
    model = small()
    x, y = data(16)
    losses = {}
    for dtype in (None, half):
        attack = PGD(model, engine="plan", amp_dtype=dtype, generator=torch.Generator().manual_seed(0))
        adversarial = attack(x, y)
        assert (adversarial - x).abs().max() <= 8 / 255 + 1e-6
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        losses[dtype] = loss_of(model, adversarial, y)
    assert losses[half] == pytest.approx(losses[None], rel=0.01)


def test_images_that_the_network_is_sure_of_move_in_float16():
    """Their gradient of the logits is below the smallest number of float16."""
    model = small()
    x, _ = data(4)
    with torch.no_grad():
        y = model(x).argmax(1)
        model.fc_downstream.bias[y] += 18.0
        assert ((1 - F.softmax(model(x), 1).gather(1, y[:, None])) < 2e-8).all()
    moved = {}
    for engine, dtype in (("eager", None), ("plan", torch.float16)):
        moved[engine] = PGD(model, engine=engine, amp_dtype=dtype, **STEP)(x, y) - x
    assert (moved["plan"] != 0).float().mean() > 0.99
    assert (moved["plan"] == moved["eager"]).float().mean() > 0.95


@pytest.mark.parametrize(
    "options",
    [{"norm": "l2", "eps": 0.5, "alpha": 0.1}, {"norm": "l2-sign", "eps": 0.5, "alpha": 0.01}, {"loss": "dlr"},
     {"loss": "kl"}, {"targeted": True}, {"loss": "dlr", "targeted": True}, {"steps": 0}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_attack(options):
    model = small()
    x, y = data(4)
    adversarial = []
    for kind in ("plan", "eager"):
        torch.manual_seed(5)
        adversarial.append(PGD(model, engine=kind, **{"steps": 3, **options})(x, y))
    # Steps in the direction of the gradient differ by its roundoff, sign steps where it is zero within roundoff.
    close = (adversarial[0] - adversarial[1]).abs() <= 1e-5
    assert close.float().mean() > 0.99
    assert (adversarial[0] != x).float().mean() > 0.9


@pytest.mark.parametrize("images", [1, 3, 8])
def test_gradient_against_a_float64_oracle(images):
    """Without signs in between: the plan's input gradient against autograd in float64."""
    model = small()
    x, y = data(images)
    attack = PGD(model, norm="l2", eps=1e6, alpha=1.0, engine="plan", **STEP)
    moved = attack(x * 0.5 + 0.25, y) - (x * 0.5 + 0.25)
    exact = copy.deepcopy(model).double()
    leaf = (x * 0.5 + 0.25).double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(exact(leaf), y, reduction="sum"), leaf)
    inside = moved.abs() > 0  # the step of length one stays inside [0, 1] where it is small enough
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved[inside], unit.float()[inside], rtol=0, atol=1e-5)


def test_images_are_independent_and_chunks_do_not_matter(monkeypatch):
    model = small()
    x, y = data(13)
    whole = PGD(model, engine="plan", **STEP)(x, y)
    few_at_once(monkeypatch)
    attack = PGD(model, engine="plan", **STEP)
    assert torch.equal(attack(x, y), whole)
    assert program_of(attack, x).chunk(13) == 1
    monkeypatch.undo()
    found = program_of(attack, x)
    for images_in_cache, at_once in ((40, 32), (5, 5), (0.5, 4), (0.25, 2), (0.01, 1)):
        monkeypatch.setattr(found, "bytes_per_image", int(program.CACHED / images_in_cache))
        assert found.chunk(32) == -(-32 // -(-32 // at_once))


def test_the_chunk_size_is_a_setting():
    model = small()
    x, y = data(13)
    attack = PGD(model, engine="plan", **STEP)
    whole = attack(x, y)
    for attack.chunk_size, at_once in ((5, 5), (1, 1), (100, 13), (6, 5)):  # chunks alike: 13 as 5, 5 and 3
        assert torch.equal(attack(x, y), whole)
        assert program_of(attack, x).chunk(13) == at_once
        report = attack.explain(x)
        assert report.images == at_once
        assert str(report).startswith(f"plan: {at_once} image{'s' if at_once > 1 else ''} at once")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        PGD(model, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size must be an integer"):
        PGD(model, chunk_size=2.5)


class Grouped(nn.Module):
    """Depthwise convolutions as in MobileNet and groups as in ResNeXt, of widths that do and do not fill vectors."""

    def __init__(self):
        super().__init__()

        def conv(inputs, outputs, kernel, groups=1, stride=1):
            layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs))

        relu = nn.ReLU()
        self.stem = nn.Sequential(conv(3, 20, 3), relu, conv(20, 20, 3, 20, 2), relu)
        self.mobile = nn.Sequential(conv(20, 72, 1), relu, conv(72, 72, 5, 72), relu, conv(72, 20, 1))
        self.next = nn.Sequential(conv(20, 64, 1), relu, conv(64, 64, 3, 16, 2), relu, conv(64, 96, 3, 4), relu)
        self.last = conv(96, 96, 3, 12)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.next(self.mobile(x) + x)
        return self.head(F.relu(self.last(x) + x).mean((2, 3)))


NETWORKS = {
    "bottlenecks": lambda: TransferResNet(Bottleneck, (1, 1, 1, 1), 10, upsample=64),
    "groups": Grouped,
}


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_equal_the_pytorch_executor(name, amp_dtype, monkeypatch):
    """The same plan by both executors."""
    torch.manual_seed(0)
    model = lively(NETWORKS[name](), size=16)
    x, y = data(3, 16)
    adversarial = []
    for executor in (cache.executor_for, TorchExecutor):
        monkeypatch.setattr(cache, "executor_for", executor)
        adversarial.append(anew(model, engine="plan", amp_dtype=amp_dtype, **STEP)(x, y))
    # In bfloat16 roundoff flips the signs of small gradients.
    assert (adversarial[0] == adversarial[1]).float().mean() > (0.999 if amp_dtype is None else 0.9)


def test_operations_that_mix_rows_see_the_whole_batch(monkeypatch):
    class Centred(Doubled):
        def forward(self, x):
            logits = self.body(x)
            return logits - logits.mean(0, keepdim=True) * 0.5

    few_at_once(monkeypatch)
    model = Centred(small())
    x, y = data(6)
    assert_same_step(model, x, y)
    assert not program_of(PGD(model, engine="plan"), x).plan.per_sample


def test_in_place_operations_and_views():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8 * 64, 10)

        def forward(self, x):
            y = self.conv(x)
            z = y
            y.mul_(2)
            z += 1
            return self.head(torch.flatten(y.relu(), 1))

    x, y = data(3, 8)
    assert_same_step(lively(Views()), x, y)

    class Slices(Views):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            y[:, :4].relu_()
            return self.head(torch.flatten(y, 1))

    model = lively(Slices(), size=8)
    assert_same_step(model, x, y)
    assert "+ folded batch norm" in str(PGD(model).explain(x))


def test_kl_reference_of_many_chunks(monkeypatch):
    model = small()
    x, y = data(9)
    options = {"loss": "kl", "steps": 3}
    whole = PGD(model, engine="plan", generator=torch.Generator().manual_seed(0), **options)(x, y)
    few_at_once(monkeypatch)
    parts = PGD(model, engine="plan", generator=torch.Generator().manual_seed(0), **options)(x, y)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    x, y = data(6)
    attack = PGD(small(), engine="plan", amp_dtype=dtype, random_start=False)
    before, adversarial = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            adversarial.append(attack(x, y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(adversarial[0], adversarial[1]) and torch.equal(adversarial[0], adversarial[2])


@pytest.mark.parametrize("images", [0, 1])
def test_smallest_batches(images):
    model = small()
    x, y = data(4)
    adversarial = PGD(model, engine="plan", **STEP)(x[:images], y[:images])
    assert adversarial.shape == x[:images].shape
    assert images == 0 or torch.equal(adversarial, PGD(model, engine="plan", **STEP)(x, y)[:1])


def test_any_memory_layout():
    model = small()
    x, y = data(4)
    adversarial = PGD(model, engine="plan", **STEP)(x, y)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.empty(4, 3, 32, 64)
    wide[..., ::2] = x
    for images in (last, wide[..., ::2], x.flip(3).contiguous().flip(3)):
        before = images.clone()
        again = PGD(model, engine="plan", **STEP)(images, y)
        assert torch.equal(again, adversarial) and torch.equal(images, before)
    assert PGD(model, engine="plan", **STEP)(last, y).is_contiguous(memory_format=torch.channels_last)
