"""The attack engine: the plan equals eager, sees the model as it is, falls back honestly and survives faults."""

import copy
import gc
import pickle
import random
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from bench import networks
from twins_fast import PGD, convert_twin_bn, fuse_twin_bn, wings
from twins_fast.attacks.engine import program as engine
from twins_fast.attacks.engine.executors.torch import Leaves
from twins_fast.attacks.engine.program import Program
from twins_fast.checkpoints import load_pretrained, read_state_dict
from twins_fast.models import CifarResNet, TransferResNet, build_model
from twins_fast.ops import native
from twins_fast.train import assets

STEP = {"steps": 1, "random_start": False}


def lively(model: nn.Module, seed: int = 0, size: int = 32) -> nn.Module:
    """Statistics, weights and heads as after training, and few ReLU inputs that are zero within roundoff.

    Such an input passes its gradient or not by chance, which moves all gradients before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(like, low, high):
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in norms:
            module.weight.copy_(drawn(module.weight, 0.3, 0.6))
            module.bias.copy_(drawn(module.bias, 1.5, 2) * drawn(module.bias, -0.5, 1).sign())
            module.momentum = 1.0  # the statistics are those of the batch that follows
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(drawn(module.weight, -1, 1) / module.in_features**0.5)
        if norms:
            model.train()(torch.rand(4, 3, size, size, generator=generator))
            for module in norms:
                module.momentum = 0.1
    return model.eval()


def data(images=2, size=32, classes=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(images, 3, size, size, generator=generator)
    return x, torch.randint(0, classes, (images,), generator=generator)


def small(**options) -> nn.Module:
    torch.manual_seed(1)
    return lively(CifarResNet(10, width=8, blocks=(1, 1), **options))


def program_of(attack: PGD, images) -> Program:
    found = attack._program(images)
    assert isinstance(found, Program), found
    return found


def loss_of(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


def assert_same_step(model, x, y, **options):
    """One step of both engines: equal but for signs of gradients that are zero within roundoff."""
    planned = PGD(model, engine="plan", **STEP, **options)(x, y)
    eager = PGD(model, engine="eager", **STEP, **options)(x, y)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    differ = planned != eager
    assert differ.float().mean() <= 1e-3
    assert (gradient.abs()[differ] <= 1e-5 * gradient.abs().max()).all()
    assert (eager != x).float().mean() > 0.5


def ten_steps(model, x, y, **options):
    """Loss after an attack by each engine from the same start."""
    made = {}
    for kind in ("plan", "eager"):
        made[kind] = PGD(model, engine=kind, generator=torch.Generator().manual_seed(3), **options)(x, y)
    return {kind: loss_of(model, images, y) for kind, images in made.items()}


def timm_model(name):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10)


TV = torchvision.models
ARCHITECTURES = {
    "resnet18": (lambda: TV.resnet18(num_classes=10), 64, set()),
    "resnet50": (lambda: TV.resnet50(num_classes=10), 64, set()),
    "wide_resnet50_2": (lambda: TV.wide_resnet50_2(num_classes=10), 64, set()),
    "resnext50": (lambda: TV.resnext50_32x4d(num_classes=10), 64, set()),
    "densenet121": (lambda: TV.densenet121(num_classes=10), 64, {"cat"}),
    "vgg16_bn": (lambda: TV.vgg16_bn(num_classes=10), 32, {"adaptive_avg_pool2d, flatten"}),
    "mobilenet_v2": (lambda: TV.mobilenet_v2(num_classes=10), 64, {"hardtanh"}),
    "timm resnet26": (lambda: timm_model("resnet26"), 64, set()),
    "timm efficientnet_b0": (lambda: timm_model("efficientnet_b0"), 64, {"silu", "sigmoid, mul"}),
    "preact_resnet18": (lambda: networks.preact_resnet18(10), 32, set()),
    "wrn_28_10": (lambda: networks.wide_resnet(28, 10, 10), 32, set()),
    "cifar_resnet18": (lambda: networks.cifar_resnet18(10), 32, set()),
    "vit_b_16": (lambda: TV.vit_b_16(num_classes=10, image_size=64), 64, None),
    "convnext_tiny": (lambda: TV.convnext_tiny(num_classes=10), 64, None),
    "resnet50 of enlarged images": (lambda: build_model("resnet50", 10, upsample=112), 16, set()),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_takes_the_plan_and_equals_eager(name):
    build, size, left = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = lively(build(), size=size)
    x, y = data(2, size)
    assert_same_step(model, x, y)
    # A small ball: a deep random network magnifies what ten steps make of one roundoff, a trained one does not.
    losses = ten_steps(model, x, y, eps=1 / 255, alpha=0.25 / 255)
    assert losses["plan"] == pytest.approx(losses["eager"], abs=1e-4)
    report = PGD(model).explain(x)
    assert report.engine == "plan"
    found = {layer["op"] for layer in report.layers if "not planned" in layer["runs"]}
    assert left is None or found == left


@pytest.mark.skipif(native._C is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", ["resnet50", "cifar_resnet18", "resnet50 of enlarged images"])
def test_convolutions_of_a_matrix_unit(name, monkeypatch):
    """On a CPU that has one they are oneDNN's; here with vectors, and in float32, to compare them."""
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


def test_everything_around_convolutions_is_fused():
    report = PGD(small()).explain(data()[0])
    assert all(layer["op"].startswith(("3x3", "1x1", "mean")) for layer in report.layers)
    assert sum("sum + ReLU" in layer["op"] for layer in report.layers) == 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_attacks_as_well(half):
    model = small()
    x, y = data(16)
    made = {}
    for dtype in (None, half):
        attack = PGD(model, engine="plan", amp_dtype=dtype, generator=torch.Generator().manual_seed(0))
        made[dtype] = attack(x, y)
        assert (made[dtype] - x).abs().max() <= 8 / 255 + 1e-6 and made[dtype].min() >= 0 and made[dtype].max() <= 1
    assert loss_of(model, made[half], y) == pytest.approx(loss_of(model, made[None], y), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"norm": "l2", "eps": 0.5, "alpha": 0.1}, {"norm": "l2-sign", "eps": 0.5, "alpha": 0.01}, {"loss": "dlr"},
     {"loss": "kl"}, {"targeted": True}, {"loss": "dlr", "targeted": True}, {"steps": 0}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_attack(options):
    model = small()
    x, y = data(4)
    made = []
    for kind in ("plan", "eager"):
        torch.manual_seed(5)
        made.append(PGD(model, engine=kind, **{"steps": 3, **options})(x, y))
    # Steps in the direction of the gradient differ by its roundoff, sign steps where it is zero within roundoff.
    close = (made[0] - made[1]).abs() <= 1e-5
    assert close.float().mean() > 0.99
    assert (made[0] != x).any()


@pytest.mark.parametrize("images", [1, 3, 8])
def test_float64_truth_of_the_gradient(images):
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


# The model as it is now


def double_weights(model):
    model.conv1.weight.data *= 2


def rebind_data(model):
    model.conv1.weight.data = model.conv1.weight.data.clone() * 2


def rebind_parameter(model):
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * 2)


def rebind_buffer(model):
    model.bn1.running_mean = model.bn1.running_mean + 0.3


def new_statistics(model):
    model.train()(data(4)[0])
    model.eval()


def optimiser_step(model):
    x, y = data(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def load_other_state(model):
    model.load_state_dict(lively(copy.deepcopy(model), seed=9).state_dict())


def other_normalisation(model):
    model.mean += 0.1


def other_eps(model):
    model.bn1.eps = 0.5


def other_stride(model):
    model.layers[0][0].conv1.stride = (2, 2)
    model.layers[0][0].conv2 = nn.Upsample(scale_factor=2)


def other_module(model):
    model.relu = nn.SiLU()


def other_forward(model):
    forward = type(model).forward
    model.forward = lambda images: forward(model, images.flip(3))


def other_head(model):
    model.fc_downstream = nn.Linear(16, 12)


CHANGES = [double_weights, rebind_data, rebind_parameter, rebind_buffer, new_statistics, optimiser_step,
           load_other_state, other_normalisation, other_eps, other_module, other_forward, other_head]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_seen_at_the_next_call(change):
    model = small()
    x, y = data(4)
    attack = PGD(model, engine="plan", **STEP)
    before = attack(x, y)
    change(model)
    after = attack(x, y)
    assert torch.equal(after, PGD(model, engine="plan", **STEP)(x, y))
    assert not torch.equal(after, before)
    assert_same_step(model.eval(), x, y)


def test_wing_is_the_one_that_evaluation_uses():
    model = fuse_twin_bn(convert_twin_bn(small()))
    x, y = data(4)
    with torch.no_grad():
        model.bn1.weight *= -1
    attack = PGD(model, engine="plan", **STEP)
    with wings(model, "frozen"):
        frozen = attack(x, y)
        assert_same_step(model, x, y)
    adaptive = attack(x, y)
    assert_same_step(model, x, y)
    assert not torch.equal(frozen, adaptive)
    with wings(model.train(), "frozen"):
        assert torch.equal(attack(x, y), frozen)


def test_other_shapes_and_precisions_get_their_own_plan():
    model = small()
    attack = PGD(model, engine="plan", **STEP)
    for size in (32, 16, 32, 20):
        x, y = data(3, size)
        assert torch.equal(attack(x, y), PGD(model, engine="plan", **STEP)(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        half = attack(x, y)
    attack.amp_dtype = torch.bfloat16
    assert torch.equal(attack(x, y), half)


def test_batch_sizes_share_a_plan(monkeypatch):
    captures = []
    real = engine.capture
    monkeypatch.setattr(engine, "capture", lambda *a: captures.append(1) or real(*a))
    model = small()
    attack = PGD(model, engine="plan", **STEP)
    whole, labels = data(40)
    everything = attack(whole, labels)
    for images in (1, 2, 3, 5, 7, 11, 16, 23, 31, 40):
        assert torch.equal(attack(whole[:images], labels[:images]), everything[:images])
    assert len(captures) == 1
    program = program_of(attack, whole)
    assert len(program._bound) <= engine.KEPT_SIZES and len(attack._engine._plans) == 1


def test_plans_are_bounded():
    attack = PGD(small(), engine="plan", **STEP)
    for size in (8, 12, 16, 20, 24, 28):
        attack(*data(2, size))
    assert len(attack._engine._plans) == engine.KEPT_PLANS


def test_images_are_independent_and_chunks_do_not_matter(monkeypatch):
    model = small()
    x, y = data(13)
    whole = PGD(model, engine="plan", **STEP)(x, y)
    monkeypatch.setattr(engine, "CACHED", 1)
    attack = PGD(model, engine="plan", **STEP)
    assert torch.equal(attack(x, y), whole)
    assert program_of(attack, x).chunk(13) == 1


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_kernels_equal_plain_pytorch_leaves(amp_dtype, monkeypatch):
    """The same plan through both sets of leaves."""
    model = lively(TransferResNet(Bottleneck, (1, 1, 1, 1), 10, upsample=64), size=16)
    x, y = data(3, 16)
    made = []
    for leaves in (engine.leaves_for, Leaves):
        monkeypatch.setattr(engine, "leaves_for", leaves)
        made.append(PGD(model, engine="plan", amp_dtype=amp_dtype, **STEP)(x, y))
    # In bfloat16 roundoff turns the signs of small gradients.
    assert (made[0] == made[1]).float().mean() > (0.999 if amp_dtype is None else 0.9)


# Falling back


class Doubled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body


class ValueDependent(Doubled):
    def forward(self, x):
        return self.body(x) if x.mean() > 0.1 else self.body(x * 2)


class Random(Doubled):
    def forward(self, x):
        return self.body(x) + torch.rand(1)


class Counting(Doubled):
    def __init__(self, body):
        super().__init__(body)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.body(x)


class Pair(Doubled):
    def forward(self, x):
        return self.body(x), x


class WithoutGradient(Doubled):
    def forward(self, x):
        with torch.no_grad():
            shift = self.body(x)
        return self.body(x) - shift


def hooked(body):
    body.bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    return body


@pytest.mark.parametrize(
    ("make", "reason"),
    [(ValueDependent, "."), (Random, "random"), (Counting, "."), (WithoutGradient, "."), (hooked, "bn1 has hooks"),
     (lambda body: body.double(), "float64")],
)  # fmt: skip
def test_what_cannot_be_planned_runs_in_eager_and_says_why(make, reason):
    model = make(small())
    x, y = data(4)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(0)
    made = PGD(model, **STEP)(x, y)
    torch.manual_seed(0)
    assert torch.equal(made, PGD(model, engine="eager", **STEP)(x, y))
    with pytest.raises(RuntimeError, match=f"engine='plan': .*{reason}"):
        PGD(model, engine="plan", **STEP)(x, y)
    report = PGD(model).explain(x)
    assert report.engine == "eager" and report.reason and str(report) == f"eager: {report.reason}"


def test_batch_statistics_are_eager():
    model = small()
    assert "batch statistics" in PGD(model, bn_mode="train").explain(data()[0]).reason
    with pytest.raises(ValueError, match="bn_mode='eval'"):
        PGD(model, bn_mode="train", engine="plan")
    with pytest.raises(ValueError, match="unknown engine"):
        PGD(model, engine="fast")


def test_a_model_that_changes_at_every_call_is_left_alone():
    class Restless(Doubled):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    attack = PGD(Restless(small()), **STEP)
    x, y = data(2)
    for _ in range(engine.RESTLESS + 2):
        attack.model.calls += 1
        attack(x, y)
    assert "from call to call" in attack.explain(x).reason


def test_operations_that_mix_rows_see_the_whole_batch(monkeypatch):
    class Centred(Doubled):
        def forward(self, x):
            logits = self.body(x)
            return logits - logits.mean(0, keepdim=True) * 0.5

    monkeypatch.setattr(engine, "CACHED", 1)
    model = Centred(small())
    x, y = data(6)
    assert_same_step(model, x, y)
    assert not program_of(PGD(model, engine="plan"), x).plan.each_row


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
        def forward(self, x):
            y = self.conv(x)
            y[:, :4].relu_()
            return self.head(torch.flatten(y, 1))

    assert "shares" in PGD(lively(Slices())).explain(x).reason


class Net(nn.Module):
    """Layers for the forwards below."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, padding=1)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.cfg = SimpleNamespace(scale=1.0, parts={1})
        self.number = torch.tensor(1.0)

    def top(self, x):
        return self.head(x.mean((2, 3)))


def net(forward):
    torch.manual_seed(0)
    return type("Forwarded", (Net,), {"forward": forward})()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def with_hook(m, x):
    a = m.c1(x)
    if a.requires_grad:
        a.register_hook(lambda g: -g)
    return m.top(a.relu())


def write_to_copy(copied):
    def forward(m, x):
        a = m.c1(x)
        b = copied(a)
        b.relu_()
        return m.top(a + 2 * b)

    return forward


def shifted(m, x):
    return m.top(torch.roll(m.c1(x), random.randint(0, 7), 3).relu())


def constant_twice(m, x):
    k = torch.ones(x.shape[0], 1, 1, 1)
    return m.top(m.c2(m.c1(x * k)).relu() * (k + 1))


def chosen(m, x):
    a = m.c1(x)
    mask, index = a > 0, a.argmax(1, keepdim=True)
    b = m.c2(a)
    return m.top(torch.where(mask, b, 0.1 * b) + b.gather(1, index))


FORWARDS = {
    "own backward": lambda m, x: m.top(Reversed.apply(m.c1(x)).relu()),
    "hook on a tensor": with_hook,
    "a branch on the batch": lambda m, x: m.top(m.c1(x) if x.shape[0] > 10 else m.c1(x).relu()),
    "a branch on odd batches": lambda m, x: m.top(m.c1(x) if x.shape[0] % 2 else m.c1(x).relu()),
    "a branch on one image": lambda m, x: m.top(m.c1(x) if x.shape[0] == 1 else m.c1(x).relu()),
    "a branch on requires_grad": lambda m, x: m.top(m.c1(x).relu() if x.requires_grad else m.c1(x)),
    "a write to a clone": write_to_copy(torch.clone),
    "a write to a contiguous copy": write_to_copy(lambda a: a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    "a write to a converted copy": write_to_copy(lambda a: a.to(torch.float32, copy=True)),
    "batch statistics": lambda m, x: m.top(F.batch_norm(m.c1(x), None, None, training=True).relu()),
    "padding of the batch": lambda m, x: m.top(m.c1(F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)))),
    "enlargement by a scale": lambda m, x: m.top(m.c1(F.interpolate(x, scale_factor=1.3))),
    "strides": lambda m, x: m.top(m.c1(x).as_strided((x.shape[0], 8, 4, 4), (512, 64, 8, 1)).relu()),
    "booleans and indices": chosen,
    "a constant led by the batch": constant_twice,
    "no logits": lambda m, x: m.c1(x).mean((2, 3), keepdim=True),
    "double use": lambda m, x: m.top((lambda a: (a + a).relu() + a.relu())(m.c1(x))),
    "one layer twice": lambda m, x: m.top(m.c2(m.c2(m.c1(x)).relu()).relu()),
    "a channel shuffle": lambda m, x: m.top(m.c1(x).view(x.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)),
    "a flattened view": lambda m, x: m.head(F.adaptive_avg_pool2d(m.c1(x).relu(), 1).view(x.size(0), -1)),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("images", [1, 3, 12])
def test_unusual_forwards_are_planned_right_or_not_at_all(name, images, monkeypatch):
    monkeypatch.setattr(engine, "CACHED", 1)  # rows that see each other would show
    model = net(FORWARDS[name])
    x, y = data(images, 8)
    options = {"norm": "l2", "eps": 1.0, "alpha": 0.05, "steps": 2, "random_start": False}
    made = []
    for kind in ("auto", "eager"):
        try:
            made.append(PGD(model, engine=kind, **options)(x, y))
        except ValueError as error:
            made.append(str(error))
    if isinstance(made[1], str):
        assert made[0] == made[1]
    else:
        assert (made[0] - made[1]).norm() <= 1e-4 * (made[1] - x).norm()


@pytest.mark.parametrize("name", ["double use", "one layer twice", "a channel shuffle", "a flattened view"])
def test_common_forwards_are_planned_in_chunks(name):
    assert program_of(PGD(net(FORWARDS[name])), data(4, 8)[0]).plan.each_row


def test_random_choices_are_not_frozen_and_the_capture_draws_none():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    report = PGD(net(shifted)).explain(data(4, 8)[0])
    assert "random" in report.reason and random.random() == expected


def test_kl_reference_of_many_chunks(monkeypatch):
    model = small()
    x, y = data(9)
    options = {"loss": "kl", "steps": 3}
    whole = PGD(model, engine="plan", generator=torch.Generator().manual_seed(0), **options)(x, y)
    monkeypatch.setattr(engine, "CACHED", 1)
    parts = PGD(model, engine="plan", generator=torch.Generator().manual_seed(0), **options)(x, y)
    assert torch.equal(whole, parts)


def separate_layers(m):
    m.c3 = copy.deepcopy(m.c2)
    m.c3.weight.data.neg_()


def separate_weights(m):
    m.c3.weight = nn.Parameter(-m.c2.weight.detach())


def set_scale(m):
    m.cfg.scale = -3.0


def set_number(m):
    m.number.fill_(-3)


def set_class(m):
    type(m).forward = lambda self, x: -self.top(self.c1(x).relu())


@pytest.mark.parametrize("change", [separate_layers, separate_weights, set_scale, set_number, set_class])
def test_changes_of_structure_are_seen(change):
    def forward(m, x):
        return m.top(m.c3(m.c2(m.c1(x)).relu()).relu() * m.cfg.scale * float(m.number))

    model = net(forward)
    model.c3 = model.c2
    if change is separate_weights:
        model.c3 = nn.Conv2d(8, 8, 3, padding=1)
        model.c3.weight, model.c3.bias = model.c2.weight, model.c2.bias
    x, y = data(4, 8)
    attack = PGD(model, **STEP)
    attack(x, y)
    change(model)
    assert torch.equal(attack(x, y), PGD(model, **STEP)(x, y))


def test_a_model_that_merges_weights_in_eval_mode():
    class Merging(Net):
        def train(self, mode=True):
            if self.training != mode:
                self.c1.weight.data.mul_(-0.5 if not mode else -2)
            return super().train(mode)

        def forward(self, x):
            return self.top(self.c1(x).relu())

    model = Merging()
    x, y = data(4, 8)
    attack = PGD(model, engine="plan", **STEP)
    first = attack(x, y)
    assert torch.equal(attack(x, y), first)
    assert (first == PGD(model, engine="eager", **STEP)(x, y)).float().mean() > 0.999


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_looked_through(wrap):
    model = small()
    x, y = data(4)
    attack = PGD(wrap(model), engine="plan", **STEP)
    assert torch.equal(attack(x, y), PGD(model, engine="plan", **STEP)(x, y))
    double_weights(model)
    assert torch.equal(attack(x, y), PGD(model, engine="plan", **STEP)(x, y))
    attack.model.register_forward_hook(lambda module, inputs, logits: -logits)
    assert "hooks" in PGD(attack.model).explain(x).reason


def test_distributed_processes_stay_in_eager():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        assert "attack its .module" in PGD(model).explain(data()[0]).reason
        assert PGD(model.module).explain(data()[0]).engine == "plan"
    finally:
        torch.distributed.destroy_process_group()


def test_another_model_of_the_same_attack():
    x, y = data(4)
    attack = PGD(small(), engine="plan", **STEP)
    attack(x, y)
    attack.model = lively(CifarResNet(10, width=16, blocks=(1,)), seed=4)
    assert torch.equal(attack(x, y), PGD(attack.model, engine="plan", **STEP)(x, y))


def test_threads_take_turns():
    model = small()
    attack = PGD(model, engine="plan", random_start=False, steps=3)
    batches = [data(6, seed=seed) for seed in range(4)]
    expected = [attack(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for made, alone in zip(pool.map(lambda batch: attack(*batch), batches * 3), expected * 3, strict=True):
            assert torch.equal(made, alone)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    x, y = data(6)
    attack = PGD(small(), engine="plan", amp_dtype=dtype, random_start=False)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(attack(x, y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_forgetting_frees_the_plans():
    attack = PGD(small(), engine="plan", **STEP)
    program = weakref.ref(program_of(attack, data()[0]))
    attack.forget()
    gc.collect()
    assert program() is None


# Faults


def state_of(model):
    flags = [module.training for module in model.modules()]
    return flags, [p.requires_grad for p in model.parameters()], copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    flags, wanted, entries = state_of(model)
    assert flags == before[0] and wanted == before[1]
    assert all(torch.equal(entries[name], before[2][name]) for name in entries)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError("boom")])
def test_a_fault_in_the_middle_leaves_the_model_and_the_engine_usable(fault, monkeypatch):
    model = small().train()
    model.conv1.weight.requires_grad_(False)
    x, y = data(4)
    attack = PGD(model, engine="plan", random_start=False)
    good = attack(x, y)
    before = state_of(model)
    calls = []
    real = engine._run

    def failing(steps):
        calls.append(1)
        if len(calls) == 7:
            raise fault
        real(steps)

    monkeypatch.setattr(engine, "_run", failing)
    with pytest.raises(fault if isinstance(fault, type) else type(fault)):
        attack(x, y)
    monkeypatch.undo()
    assert_untouched(model, before)
    assert torch.equal(attack(x, y), good)


def test_out_of_memory_goes_on_in_smaller_chunks(monkeypatch):
    x, y = data(8)
    model = small()
    good = PGD(model, engine="plan", random_start=False)(x, y)
    real = Program.bound

    def bound(self, rows):
        if rows > 3:
            raise MemoryError
        return real(self, rows)

    monkeypatch.setattr(Program, "bound", bound)
    attack = PGD(model, engine="plan", random_start=False)
    with pytest.warns(UserWarning, match="memory ran out with 8 images at once; going on with 4"):
        assert torch.equal(attack(x, y), good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it remembers
        assert torch.equal(attack(x, y), good)
    monkeypatch.setattr(Program, "bound", lambda self, rows: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack(x, y)


@pytest.mark.parametrize("kind", ["plan", "eager"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pixels_with_nan_gradients_stay(kind, norm):
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 16, 10)

        def forward(self, x):
            y = x + 0  # one NaN per image: the derivative of 0 * sqrt at zero
            root = (y[:, :1, :1, :1] * 0).sqrt() * 0
            return self.head(torch.flatten(y, 1)) + root.flatten(1)

    torch.manual_seed(0)
    x, y = data(5, 4)
    attack = PGD(Rooted(), engine=kind, norm=norm, steps=2, random_start=False)
    with pytest.warns(UserWarning, match="10 gradients of pixel values were NaN"):
        made = attack(x, y)
    assert attack.nan_gradients == 10
    moved = made != x
    assert not moved[:, 0, 0, 0].any() and moved.flatten(1).sum(1).min() > 40
    assert made.isfinite().all()


@pytest.mark.parametrize("images", [0, 1])
def test_smallest_batches(images):
    model = small()
    x, y = data(4)
    made = PGD(model, engine="plan", **STEP)(x[:images], y[:images])
    assert made.shape == x[:images].shape
    assert images == 0 or torch.equal(made, PGD(model, engine="plan", **STEP)(x, y)[:1])


def test_any_memory_layout():
    model = small()
    x, y = data(4)
    made = PGD(model, engine="plan", **STEP)(x, y)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.empty(4, 3, 32, 64)
    wide[..., ::2] = x
    for images in (last, wide[..., ::2], x.flip(3).contiguous().flip(3)):
        kept = images.clone()
        again = PGD(model, engine="plan", **STEP)(images, y)
        assert torch.equal(again, made) and torch.equal(images, kept)
    assert PGD(model, engine="plan", **STEP)(last, y).is_contiguous(memory_format=torch.channels_last)


def test_labels_beyond_the_classes_are_refused():
    x, _ = data(2)
    with pytest.raises(ValueError, match="class 10, but the model has 10"):
        PGD(small(), engine="plan")(x, torch.tensor([1, 10]))


def test_copies_and_pickles():
    attack = PGD(small(), engine="plan", **STEP)
    x, y = data(2)
    made = attack(x, y)
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert torch.equal(other(x, y), made)


def test_memory_is_flat_over_many_calls():
    attack = PGD(small(), engine="plan", steps=1)
    batches = [data(n) for n in (3, 7, 16)]
    for x, y in batches * 2:
        attack(x, y)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = tensors()
    for _ in range(5):
        for x, y in batches:
            attack(x, y)
    assert tensors() <= before + 4


def test_timed_explanation_covers_every_layer():
    model = small()
    x, y = data(4)
    report = PGD(model).explain(x, y, timed=True)
    assert report.images == 4
    for layer in report.layers:
        assert layer["forward_ms"] > 0 and layer["backward_ms"] > 0 and layer["bytes"] > 0
    text = str(report)
    assert "forward ms" in text and "layers.0.0.conv1" in text
