"""What only a CUDA device can show: graph capture, streams, another device, more than 2^31 values."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.ops.cases import EPS, FORMATS, MOMENTUM, Case
from twins_fast import TrainingStep, accelerate, ops
from twins_fast.attacks import PGD
from twins_fast.attacks.engine import cache, cuda_graph
from twins_fast.methods import METHODS
from twins_fast.models import CifarResNet
from twins_fast.ops import backend, native, reference
from twins_fast.qualify.checks import captured

with_cuda = pytest.mark.skipif(not getattr(native._C, "has_cuda", False), reason="built without nvcc")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
each_backend = pytest.mark.parametrize("name", [pytest.param("cuda", marks=with_cuda), "triton"])


def a_case(memory_format=torch.channels_last, device="cuda", seed=0):
    return Case((16, 64, 28, 28), 8, torch.bfloat16, memory_format, True, True, device, seed)


@each_backend
@pytest.mark.parametrize("memory_format", FORMATS)
def test_graph_capture(name, memory_format):
    case, other = a_case(memory_format), a_case(memory_format, seed=1)
    x, residual = case.x.clone().requires_grad_(), case.residual.clone().requires_grad_()
    adaptive = [t.clone() for t in case.adaptive]

    def step():
        y = ops.twin_batch_norm(x, 8, case.frozen, adaptive, MOMENTUM, EPS, residual, True)
        return y, *torch.autograd.grad(y, (x, residual), case.dy)

    with backend.use_backend(name):
        replay, results = captured(step)
        for inputs in (other, case):  # each replay sees new inputs and updates the running statistics once more
            with torch.no_grad():
                x.copy_(inputs.x), residual.copy_(inputs.residual)
            before = [t.clone() for t in adaptive[:2]]
            replay()
            want_x, want_residual = inputs.x.clone().requires_grad_(), inputs.residual.clone().requires_grad_()
            wing = [*before, *case.adaptive[2:]]
            y = ops.twin_batch_norm(want_x, 8, case.frozen, wing, MOMENTUM, EPS, want_residual, True)
            want = (y, *torch.autograd.grad(y, (want_x, want_residual), case.dy))
            assert all(torch.equal(a, b) for a, b in zip((*results, *adaptive[:2]), (*want, *wing[:2]), strict=True))


@each_backend
def test_side_stream(name):
    case = a_case()
    with backend.use_backend(name):
        want = case.run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # what runs on another stream would overtake
            case.x.mul_(2)
            got = case.run()
        stream.synchronize()
        case.x.div_(2)
    case.x.mul_(2)
    case.check(got, name)
    assert not torch.equal(got[0], want[0])


@each_backend
def test_many_streams_at_once(name):
    """Cooperative launches of several streams share the device."""
    cases = [a_case(seed=seed) for seed in range(8)]
    with backend.use_backend(name):
        want = [case.run() for case in cases]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        got = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(case.run())
        torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(t, u) for t, u in zip(a, b, strict=True))


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(name):
    with backend.use_backend(name):
        case = a_case(device="cuda:1")
        assert torch.cuda.current_device() == 0
        case.check(case.run(), name)


@each_backend
@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_than_2_to_the_31_values(name, memory_format):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    images, channels, side = 2**14 + 6, 64, 46  # 2.2e9 values
    x = torch.empty((images, channels, side, side), dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    x.normal_()
    zeros, ones = (lambda: torch.zeros(channels, device="cuda")), (lambda: torch.ones(channels, device="cuda"))
    wings = [[zeros(), ones(), ones(), None] for _ in range(2)]
    split = images - 4
    with backend.use_backend(name):
        y = ops.twin_batch_norm(x, split, *wings, MOMENTUM, EPS, relu=True)
    # The first rows, and those about the border between the wings, at the very end.
    for rows in (slice(0, 2), slice(split - 2, None)):
        fresh = [[None if t is None else t.clone() for t in wing] for wing in wings]
        want = reference.twin_batch_norm(x[rows].float(), 2, *fresh, MOMENTUM, EPS, relu=True)
        torch.testing.assert_close(y[rows].float(), want, rtol=2**-7, atol=2**-7)


@pytest.fixture
def victim():
    """A network with batch norms of some effect, images and labels."""
    torch.manual_seed(0)
    model = CifarResNet(num_classes=10, width=32, blocks=(2, 2)).cuda().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, torch.rand(16, 3, 32, 32, device="cuda"), torch.randint(0, 10, (16,), device="cuda")


def attacks(model, **options):
    plan, eager = (PGD(model, **{"random_start": False, **options}, engine=engine) for engine in ("plan", "eager"))
    return plan, eager


def check_attack(plan, eager, images, labels, agree=0.99, **start):
    """Nearly all pixels are the same; where a gradient is nearly 0 its sign may differ."""
    want = eager(images, labels, **start)
    for _ in range(2):  # as it is and captured, then by a replay
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the attack runs without a CUDA graph")
            adversarial = plan(images, labels, **start)
        assert ((adversarial - want).abs() < 1e-5).float().mean() > agree
        assert (adversarial - images).abs().max() <= plan.eps + 1e-6 and plan.nan_gradients == 0
    return adversarial


@pytest.mark.parametrize("loss", ["ce", "kl", "dlr"])
def test_plan_against_eager(victim, loss, exact):
    model, images, labels = victim
    check_attack(*attacks(model, loss=loss, steps=3), images, labels, x_init=images * 0.98)


@pytest.mark.parametrize("norm", ["l2", "l2-sign"])
def test_plan_of_other_norms(victim, norm, exact):
    model, images, labels = victim
    plan, eager = attacks(model, norm=norm, eps=0.5, alpha=0.1, steps=3)
    assert (plan(images, labels) - eager(images, labels)).norm() < 0.05 * (eager(images, labels) - images).norm()


@pytest.mark.parametrize(
    "options",
    [
        {"best": True, "loss": "margin"},
        {"step_rule": "apgd", "steps": 5},
        {"momentum": 0.9},
        {"norm": "l1", "eps": 12.0, "alpha": 3.0},
        {"early_stop": True},
        {"loss": lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none")},
        {"eps": torch.full((16, 1, 1, 1), 0.03)},
        {"mean": (0.5,) * 3, "std": (0.25,) * 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_an_attack(victim, options, exact):
    model, images, labels = victim
    images = (images - 0.5) / 0.25 if "mean" in options else images
    plan, eager = attacks(model, **{"steps": 3, **options})
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the attack runs without a CUDA graph")
            assert ((plan(images, labels) - eager(images, labels)).abs() < 1e-4).float().mean() > 0.98


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.03)])
def test_an_accelerated_network(victim, dtype, tolerance, exact, monkeypatch):
    monkeypatch.setattr(cache, "_reservation", lambda *_: "")  # a verdict is not asked for here
    model, images, _ = victim
    fast = accelerate(model, dtype)

    def close(actual, expected):
        assert (actual - expected).norm() <= tolerance * expected.norm()

    for rows in (16, 16, 13, 16, 1):
        leaf = images[:rows].clone().requires_grad_()
        logits = fast(leaf)
        fast(images.flip(0).requires_grad_())
        close(logits, model(images[:rows]))
        (gradient,) = torch.autograd.grad(logits[:, 3].sum(), leaf)
        close(gradient, torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)[0])
    with torch.no_grad():
        model.conv1.weight.mul_(-1)
        close(fast(images), model(images))
    assert fast.explain(images).engine == "plan"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plan_in_half_precision(victim, dtype):
    model, images, labels = victim
    plan, eager = attacks(model, amp_dtype=dtype, steps=1)
    check_attack(plan, eager, images, labels, agree=0.9)
    losses = []
    for attack in attacks(model, amp_dtype=dtype, steps=10):
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(attack(images, labels)), labels))
    assert losses[0] > 0.97 * losses[1]


def test_no_layer_of_a_plan_is_left_to_pytorch(victim):
    model, images, labels = victim
    plan, _ = attacks(model, amp_dtype=torch.bfloat16)
    plan(images, labels)
    runs = {layer["runs"] for layer in plan.explain(images, timed=True).layers}
    assert runs <= {"Triton", "cuDNN", "cuDNN, Triton", "Triton, cuDNN"}
    assert PGD(model).explain(images).engine == "eager"


def test_a_graph_sees_what_is_new(victim, exact):
    model, images, labels = victim
    plan, eager = attacks(model, steps=2)
    first = check_attack(plan, eager, images, labels)
    program = plan._program(images)
    before = first.clone()
    with torch.no_grad():
        model.conv1.weight.mul_(-1)
        model.bn1.running_mean.add_(0.5)
    second = check_attack(plan, eager, images.flip(0), labels.flip(0))
    assert len(program._graphs._captured) == 1 and torch.equal(first, before) and not torch.equal(first.flip(0), second)
    model.conv1.weight = nn.Parameter(-model.conv1.weight.detach())  # elsewhere
    check_attack(plan, eager, images, labels)
    assert len(program._graphs._captured) == 2


def test_batch_sizes_of_a_plan(victim, exact):
    model, images, labels = victim
    plan, eager = attacks(model, steps=2)
    for rows in (5, 16, 3, 16, 5, 1, 2, 4):  # the second one needs more memory, the last ones more graphs than are kept
        check_attack(plan, eager, images[:rows], labels[:rows])
    large, more = images.repeat(4, 1, 1, 1), labels.repeat(4)
    check_attack(plan, eager, large, more)
    check_attack(plan, eager, images, labels)


def test_a_plan_on_side_streams(victim, exact):
    model, images, labels = victim
    plan, _ = attacks(model, steps=2)
    want = [plan(batch, labels) for batch in (images, images.flip(0))]
    streams, adversarial = [torch.cuda.Stream() for _ in range(2)], []
    for stream, batch in zip(streams, (images, images.flip(0)), strict=True):  # both use the same memory
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            adversarial.append(plan(batch, labels))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(adversarial, want, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_random_start_of_a_plan(victim, device, exact):
    model, images, labels = victim
    runs = []
    for attack in attacks(model, steps=1, random_start=True):
        attack.generator = torch.Generator(device).manual_seed(3)
        runs.append([attack(images, labels) for _ in range(2)])
    for adversarial, want in zip(*runs, strict=True):
        assert ((adversarial - want).abs() < 1e-5).float().mean() > 0.99
    assert not torch.equal(runs[0][0], runs[0][1])


def test_nan_gradients_of_a_plan(victim):
    model, images, labels = victim
    with torch.no_grad():
        model.fc_downstream.weight[0, 0] = torch.nan
    plan, _ = attacks(model, steps=2)
    assert torch.equal(plan(images, labels), images) and plan.nan_gradients == 2 * images.numel()


def test_a_network_with_everything(exact):
    from tests.kernels.test_attack import Network

    torch.manual_seed(0)
    model = Network().cuda().eval()
    images, labels = torch.rand(5, 3, 8, 8, device="cuda"), torch.tensor([0, 1, 2, 3, 0], device="cuda")
    check_attack(*attacks(model, steps=2), images, labels)


def training_step(model, method="twins-at", dtype=None, engine="eager"):
    model = METHODS[method]().prepare(copy.deepcopy(model)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    attack = PGD(model, steps=2, engine=engine)
    return TrainingStep(model, optimizer, method=method, attack=attack, amp_dtype=dtype, scaler=scaler)


def train(step, images, labels, rates):
    losses = []
    for i, rate in enumerate(rates):
        torch.manual_seed(i)
        losses.append(step(images.roll(i, 0), labels.roll(i), rate)["loss"])
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("engine", ["eager", "plan"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["at", "twins-at", "twins-trades"])
def test_a_captured_training_step(victim, method, dtype, engine, exact, monkeypatch):
    model, images, labels = victim
    model.layers.append(nn.Dropout(0.2))  # draws from the device's generator
    rates = [0.01, 0.02, 0.005, 0.01, 0.001]
    step, other = training_step(model, method, dtype, engine), training_step(model, method, dtype, engine)
    losses = train(step, images, labels, rates)
    assert step.reason == "" and len(step._graphs._captured) == 1
    monkeypatch.setattr(cuda_graph, "has_graphs", lambda device: False)
    assert losses == pytest.approx(train(other, images, labels, rates), rel=1e-4 if dtype is None else 0.05)
    for (name, ours), theirs in zip(step.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        if dtype is None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_captured_step_is_skipped_where_its_loss_is_not_finite(victim, dtype):
    model, images, labels = victim
    step = training_step(model, dtype=dtype)
    train(step, images, labels, [0.01] * 3)
    with torch.no_grad():
        step.model.fc_downstream.bias[0] = torch.inf
    before = [p.detach().clone() for p in step.model.parameters()]
    assert not step(images, labels)["loss"].isfinite() and step.reason == ""
    assert all(torch.equal(p, old) for p, old in zip(step.model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:the training step runs without")
def test_a_step_that_waits_for_the_device_is_not_captured(victim, monkeypatch):
    model, images, labels = victim
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: forward(self, x) * (float(x.mean()) > 0))
    step = training_step(model)
    losses = train(step, images, labels, [0.01] * 3)
    assert "captur" in step.reason and all(0 < loss < 20 for loss in losses)
    torch.cuda.synchronize()
