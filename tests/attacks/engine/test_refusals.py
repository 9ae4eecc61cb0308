"""What cannot be planned runs in eager mode, and says why."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import (
    STEP,
    Doubled,
    assert_same_step,
    assert_untouched,
    data,
    few_at_once,
    net,
    program_of,
    small,
    state_of,
)
from twins_fast import PGD, accelerate, adversarial_loss


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


class CountingInSlices(Counting):
    def forward(self, x):
        self.calls.view(1)[:1] += 1
        return self.body(x)


class Pair(Doubled):
    def forward(self, x):
        return self.body(x), x


class WithoutGradient(Doubled):
    def forward(self, x):
        with torch.no_grad():
            shift = self.body(x)
        return self.body(x) - shift


def scripted(body):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return nn.Sequential(body, torch.jit.script(nn.ReLU()))


def hooked(body):
    body.bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    return body


@pytest.mark.parametrize(
    ("make", "reason"),
    [(ValueDependent, "data-dependent"), (Random, "draws random numbers"), (Counting, "changes calls"),
     (WithoutGradient, "set_grad_enabled"), (hooked, "bn1 has hooks"), (lambda body: body.double(), "float64"),
     (scripted, "1 is TorchScript")],
)  # fmt: skip
def test_what_cannot_be_planned_runs_in_eager_and_says_why(make, reason):
    model = make(small())
    x, y = data(4)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=reason):
        adversarial = PGD(model, **STEP)(x, y)
    torch.manual_seed(0)
    assert torch.equal(adversarial, PGD(model, engine="eager", **STEP)(x, y))
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


def write_to_slice_of_everything(m, x):
    a = m.c1(x)
    b = a[:, :8]  # GhostNet's
    b += m.c1(x).relu()
    return m.top((a + 2 * b).relu())


def write_to_slice(m, x):
    a = m.c1(x)
    b = a[:, :4]
    b += 1
    return m.top(a.relu())


def writes_to_copies(m, x):
    bias = m.c1.bias.clone()
    bias[:3].zero_()
    x = x.clone()
    x.mul_(2)
    a = F.conv2d(x, m.c1.weight, bias, padding=1).clone()
    a[:, 0], a[:, 5:, 2:4] = 0.5, a[:, 2:5, 2:4].relu()
    return m.top(a.relu())


def padding(m, x):
    a = m.c1(x)
    b = a.new_zeros(x.shape[0], 12, 8, 8)
    b[:, 2:10] = a
    b[:, :2] = a.mean(1, keepdim=True)
    return m.top(b[:, 1:9].relu())


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
    "a write to a slice of everything": write_to_slice_of_everything,
    "a write to a slice": write_to_slice,
    "writes to copies of all kinds": writes_to_copies,
    "writes to zeros": padding,
    "the number of images as one of Python's": lambda m, x: m.top(m.c1(x) * torch.ones(len(x), 1, 1, 1)),
    "batch statistics": lambda m, x: m.top(F.batch_norm(m.c1(x), None, None, training=True).relu()),
    "padding of the batch": lambda m, x: m.top(m.c1(F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)))),
    "upsampling by a scale": lambda m, x: m.top(m.c1(F.interpolate(x, scale_factor=1.3))),
    "strides": lambda m, x: m.top(m.c1(x).as_strided((x.shape[0], 8, 4, 4), (512, 64, 8, 1)).relu()),
    "booleans and indices": chosen,
    "a constant led by the batch": constant_twice,
    "no logits": lambda m, x: m.c1(x).mean((2, 3), keepdim=True),
    "double use": lambda m, x: m.top((lambda a: (a + a).relu() + a.relu())(m.c1(x))),
    "one layer twice": lambda m, x: m.top(m.c2(m.c2(m.c1(x)).relu()).relu()),
    "a channel shuffle": lambda m, x: m.top(m.c1(x).view(x.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)),
    "dropout in place": lambda m, x: m.top(F.dropout(m.c1(x).relu(), 0.5, training=False, inplace=True)),
    "feature dropout": lambda m, x: m.top(F.feature_alpha_dropout(m.c1(x).relu(), 0.5, training=False)),
    "a flattened view": lambda m, x: m.head(F.adaptive_avg_pool2d(m.c1(x).relu(), 1).view(x.size(0), -1)),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("images", [1, 3, 12])
def test_unusual_forwards_are_planned_right_or_not_at_all(name, images, monkeypatch):
    few_at_once(monkeypatch)  # rows that see each other would show
    model = net(FORWARDS[name])
    x, y = data(images, 8)
    options = {"norm": "l2", "eps": 1.0, "alpha": 0.05, "steps": 2, "random_start": False}
    adversarial = []
    for kind in ("auto", "eager"):
        try:
            adversarial.append(PGD(model, engine=kind, **options)(x, y))
        except ValueError as error:
            adversarial.append(str(error))
    if isinstance(adversarial[1], str):
        assert adversarial[0] == adversarial[1]
    else:
        assert (adversarial[0] - adversarial[1]).norm() <= 1e-4 * (adversarial[1] - x).norm()


@pytest.mark.parametrize(
    "name",
    [
        "double use",
        "one layer twice",
        "a channel shuffle",
        "dropout in place",
        "feature dropout",
        "a flattened view",
        "a write to a clone",
        "a write to a contiguous copy",
        "a write to a converted copy",
        "a write to a slice of everything",
        "a write to a slice",
        "writes to copies of all kinds",
    ],
)
def test_common_forwards_are_planned_in_chunks(name):
    assert program_of(PGD(net(FORWARDS[name])), data(4, 8)[0]).plan.per_sample


def test_random_choices_are_not_frozen_and_the_capture_draws_none():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    report = PGD(net(shifted)).explain(data(4, 8)[0])
    assert "random" in report.reason and random.random() == expected


REASONS = {
    "hook": (hooked, torch.float32, "bn1 has hooks, which a plan would not call: remove them"),
    "double": (lambda body: body.double(), torch.float64, "images are torch.float64: a plan computes in float32"),
    "values": (ValueDependent, torch.float32, "data-dependent"),
    "random": (Random, torch.float32, "draw none in eval mode"),
    "writes": (Counting, torch.float32, "changes calls"),
    "writes to a view": (CountingInSlices, torch.float32, "the forward changes calls"),
    "script": (scripted, torch.float32, "attack what it was made from"),
    "results": (Pair, torch.float32, "output= of PGD"),
    "logits": (lambda body: net(FORWARDS["no logits"]), torch.float32, "output= of PGD"),
    "batch": (lambda body: net(FORWARDS["a branch on the batch"]), torch.float32, "depends on the number of images"),
    "number": (lambda body: net(FORWARDS["the number of images as one of Python's"]), torch.float32, "as len(x)"),
    "backward": (lambda body: net(FORWARDS["own backward"]), torch.float32, "a backward pass of its own"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_reason_is_told_once_for_each_model_in_one_line(name):
    make, dtype, words = REASONS[name]
    (x, y), model = data(3, 8), make(small()).eval()
    x = x.to(dtype)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        for _ in range(2):
            accelerate(model)(x)
            if name not in ("results", "logits"):
                PGD(model, **STEP)(x, y)
                adversarial_loss(model, x, y, method="at")
    told = [str(m.message) for m in messages if "eager mode" in str(m.message) or "as it is" in str(m.message)]
    assert len(told) == 1 and words in told[0]
    assert len(told[0].partition("; the model ")[0]) <= 200 and "\n" not in told[0]
    assert all(m.filename == __file__ for m in messages if str(m.message) in told)


def test_a_warning_that_is_an_error_comes_once_and_leaves_the_model_as_it_was():
    model, (x, y) = hooked(small()), data(3)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has hooks"):
            PGD(model, **STEP)(x, y)
        assert_untouched(model, before)
        PGD(model, **STEP)(x, y)
        accelerate(model)(x)


def test_images_and_models_of_float64_stay_in_it():
    model, (x, y) = small().double(), data(4)
    x = x.double()
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y, reduction="sum").backward()
    with pytest.warns(UserWarning, match="images are torch.float64"):
        adversarial = PGD(model, eps=0.25, alpha=0.125, **STEP)(x, y)
    assert adversarial.dtype == torch.float64
    assert torch.equal(adversarial, (x + 0.125 * leaf.grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_of_pytorch_compute_are_planned(norm):
    model, (x, y) = small(), data(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        model.conv1 = norm(model.conv1)
    model.eval()
    attack = PGD(model, engine="plan", **STEP)
    before, plan = attack(x, y), program_of(attack, x)
    assert_same_step(model, x, y)
    with torch.no_grad():
        for parameter in model.conv1.parameters():
            parameter.copy_(parameter.flip(0))
    assert not torch.equal(attack(x, y), before) and program_of(attack, x) is plan
    assert_same_step(model, x, y)
    handle = model.conv1.register_forward_pre_hook(lambda module, inputs: None)
    assert "conv1 has hooks" in attack_reason(model, x)
    handle.remove()
    assert attack_reason(model, x) == ""


def attack_reason(model, x):
    return PGD(model).explain(x).reason


def compiled(model):
    return torch.compile(model, backend="eager")  # the others take long


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda m: compiled(nn.DataParallel(m))])
def test_wrappers_are_unwrapped(wrap):
    model = small()
    x, y = data(4)
    attack = PGD(wrap(model), engine="plan", **STEP)
    assert torch.equal(attack(x, y), PGD(model, engine="plan", **STEP)(x, y))
    model.conv1.weight.data *= 2
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
