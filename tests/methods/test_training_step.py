"""A training step captured as a graph computes what the same step does without, bit for bit, and nothing is lost."""

import copy
import gc
import random
import warnings
import weakref

import pytest
import torch
from torch import nn

from tests.graph_emulator import Device, memory_of
from twins_fast import PGD, TrainingStep, adversarial_loss
from twins_fast.attacks.engine import cache
from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.methods import METHODS, Standard, TwinsAT
from twins_fast.ops.backend import use_backend

RATES = (0.1, 0.05, 0.2, 0.01, 0.1)


@pytest.fixture
def device(monkeypatch):
    """Training steps on the CPU go through graphs."""
    with use_backend("torch"):
        yield Device(monkeypatch)


@pytest.fixture
def plain():
    """The same arithmetic without graphs."""
    with use_backend("torch"):
        yield


def batches(count=5, rows=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(rows, 3, 8, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def made(model, method="twins-at", engine="eager", optimizer=None, attack=None, **options):
    """A training step of a copy of the model."""
    torch.manual_seed(1)  # of what a method adds to it
    model = METHODS[method]().prepare(copy.deepcopy(model)).train()
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=5e-4, fused=True))
    attack = attack or (lambda model: PGD(model, steps=2, engine=engine))
    attack = None if issubclass(METHODS[method], Standard) else attack(model)
    return TrainingStep(model, optimizer(model.parameters()), method=method, attack=attack, **options)


def trained(step, rates=RATES, data=None):
    """Losses, and everything that training has changed."""
    torch.manual_seed(0)
    metrics = [step(*batch, lr=rate) for batch, rate in zip(batches() if data is None else data, rates, strict=True)]
    momenta = [entries["momentum_buffer"] for entries in step.optimizer.state.values() if "momentum_buffer" in entries]
    return [float(m["loss"]) for m in metrics], metrics, [*step.model.state_dict().values(), *momenta]


def assert_same(left, right):
    assert left[0] == right[0]
    for one, other in zip(left[1], right[1], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(left[2]) == len(right[2]) and all(torch.equal(a, b) for a, b in zip(left[2], right[2], strict=True))


def without_graph(monkeypatch, *arguments, **options):
    """What :func:`trained` gives for a step that is not captured."""
    with monkeypatch.context() as patched:
        patched.setattr("twins_fast.devices.GRAPH_DEVICES", ())
        return trained(*arguments, **options)


@pytest.mark.parametrize(
    ("method", "engine"),
    [*((name, "eager") for name, m in METHODS.items() if not m.needs_source), ("at", "plan"), ("twins-at", "plan")],
)
def test_a_replay_is_the_step(device, monkeypatch, tiny_model, method, engine):
    monkeypatch.setattr(cache, "executor_for", TorchExecutor)
    step = made(tiny_model, method, engine)
    results = trained(step)
    assert (device.captures, device.replays, step.reason) == (1, 4, "")
    assert len(set(results[0])) == 5
    assert_same(results, without_graph(monkeypatch, made(tiny_model, method, engine)))


def test_every_step_is_one_of_adversarial_loss(plain, tiny_model):
    """Without a graph and a fused optimiser, bit for bit."""
    step = made(tiny_model, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=5e-4))
    results = trained(step)
    assert step.reason == "the images are on a cpu"
    other = made(tiny_model)
    optimizer = torch.optim.SGD(other.model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    losses = []
    torch.manual_seed(0)
    for rate, (images, labels) in zip(RATES, batches(), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss, _ = adversarial_loss(other.model, images, labels, method="twins-at", attack=other.attack)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == results[0]
    assert all(torch.equal(a, b) for a, b in zip(other.model.state_dict().values(), results[2], strict=False))


def test_gradient_norms_are_those_that_the_optimiser_is_given(device, monkeypatch, tiny_model):
    """In a graph, too, and under a scaler; what has no gradient has none."""
    options = {"gradient_norms": True, "awp": 0.01}
    results = trained(made(tiny_model, "trades", **options))
    assert device.replays == 4
    assert_same(results, without_graph(monkeypatch, made(tiny_model, "trades", **options)))
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=64.0)):
        step, other = (made(tiny_model, "at", scaler=s, gradient_norms=True) for s in (scaler, None))
        for model in (step.model, other.model):
            model.bn1.weight.requires_grad_(False)
        images, labels = next(batches())
        torch.manual_seed(0)
        norms = step(images, labels, lr=0.0)["gradient_norms"]
        torch.manual_seed(0)
        adversarial_loss(other.model, images, labels, method="at", attack=other.attack)[0].backward()
        expected = [0.0 if p.grad is None else float(p.grad.norm()) for p in other.model.parameters()]
        assert expected.count(0.0) == 1
        torch.testing.assert_close(norms, torch.tensor(expected))


def test_nothing_that_a_capture_makes_is_left_behind(device, tiny_model):
    step = made(tiny_model)
    trained(step)
    (captured,) = step._graphs._captured.values()
    kept = [*step.model.state_dict().values(), *[p.grad for p in step.model.parameters()]]
    kept += [value for entries in step.optimizer.state.values() for value in entries.values()]
    assert len(kept) > 50 and all(t is None or memory_of(t) not in captured.graph.made for t in kept)
    assert step.optimizer.param_groups[0]["lr"] == RATES[-1] and not hasattr(step.optimizer, "found_inf")


def test_gradients_of_parameters_that_are_not_trained_do_not_pile_up(device, tiny_model):
    step = made(tiny_model)
    step.optimizer = torch.optim.SGD(step.model.fc_downstream.parameters(), lr=1.0, momentum=0.9, fused=True)
    trained(step)
    assert device.replays == 4 and all(p.grad is None for p in step.model.parameters())


def test_batches_of_other_sizes_have_their_own_graphs(device, monkeypatch, tiny_model):
    sizes = [8, 6, 8, 6, 7, 5, 4, 8, 8]
    data = [next(batches(1, rows)) for rows in sizes]
    step = made(tiny_model)
    results = trained(step, [0.1] * len(sizes), data)
    assert (device.captures, device.replays) == (6, 3) and len(step._graphs._captured) == 4  # the first 8 was dropped
    assert_same(results, without_graph(monkeypatch, made(tiny_model), [0.1] * len(sizes), data))


class Reading(nn.Module):
    """Reads a value on the host."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) * (1 if float(x.detach().mean()) > 0.1 else 2)


class Noisy(Reading):
    """Draws random numbers on the host."""

    def forward(self, x):
        return self.body(x) + random.random() if self.training else self.body(x)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Reading, "_local_scalar_dense: operation not permitted"), (Noisy, "on the CPU (random)")]
)
def test_a_step_that_cannot_be_captured_is_not_lost(device, monkeypatch, tiny_model, kind, reason):
    step = made(kind(tiny_model))
    random.seed(0)
    with pytest.warns(UserWarning, match="training step runs without a CUDA graph") as told:
        results = trained(step)
    assert reason in step.reason and len(told) == 1 and (device.captures, device.replays) == (1, 0)
    random.seed(0)
    assert_same(results, without_graph(monkeypatch, made(kind(tiny_model))))


def test_memory_that_runs_out_in_a_capture(device, monkeypatch, tiny_model):
    small, large = next(batches(1, 4)), next(batches(1, 8))
    data = [small, large, large, large, small]
    step, capture = made(tiny_model), Device._capture

    def with_room_for_one(*arguments, **keywords):
        device.launches_left = 10 if device.captures == 1 else None
        return capture(device, *arguments, **keywords)

    monkeypatch.setattr(torch.cuda, "graph", with_room_for_one)
    results = trained(step, RATES, data)  # the first graph makes room for the second one
    assert (device.captures, device.replays, step.reason) == (4, 1, "")
    assert_same(results, without_graph(monkeypatch, made(tiny_model), RATES, data))


def test_memory_that_never_suffices_for_a_capture(device, monkeypatch, tiny_model):
    device.launches_left = 10
    step = made(tiny_model)
    with pytest.warns(UserWarning, match="without a CUDA graph: OutOfMemoryError") as told:
        results = trained(step)
    assert len(told) == 1 and device.captures == 1 and "CUDA out of memory" in step.reason
    assert_same(results, without_graph(monkeypatch, made(tiny_model)))
    step.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(step)
    assert (device.captures, device.replays, step.reason) == (2, 4, "")


def weight_decay(step):
    step.optimizer.param_groups[0]["weight_decay"] = 0.1


def momentum(step):
    step.optimizer.param_groups[0]["momentum"] = 0.1


def new_state(step):
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def frozen_parameter(step):
    step.model.conv1.weight.requires_grad_(False)


def module_in_eval_mode(step):
    step.model.fc_downstream.eval()


def longer_attack(step):
    step.attack.steps = 3


def attribute(step):
    for module in step.model.modules():
        module.momentum = 0.5


def new_memory(step):
    step.model.conv1.weight.data = 2 * step.model.conv1.weight.data


def new_head(step):
    step.model.fc_downstream.bias = nn.Parameter(step.model.fc_downstream.bias.detach() + 1)


CHANGES = [weight_decay, momentum, new_state, frozen_parameter, module_in_eval_mode, longer_attack, attribute,
           new_memory, new_head]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen_by_the_next_step(device, monkeypatch, tiny_model, change):
    def both_halves(step):
        data = list(batches(6))
        first = trained(step, [0.1] * 3, data[:3])
        change(step)
        return first, trained(step, [0.1] * 3, data[3:])

    step = made(tiny_model)
    halves = both_halves(step)
    assert (device.captures, device.replays) == (2, 4)
    with monkeypatch.context() as patched:
        patched.setattr("twins_fast.devices.GRAPH_DEVICES", ())
        for half, expected in zip(halves, both_halves(made(tiny_model)), strict=True):
            assert_same(half, expected)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("at", [0, 3])
def test_a_loss_that_is_not_finite_changes_no_parameter(device, tiny_model, fused, scaled, at):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    step = made(tiny_model, optimizer=optimizer, scaler=scaler)
    data = list(batches(6))
    trained(step, RATES[:at], data[:at])
    parameters = [p.detach().clone() for p in step.model.parameters()]
    moments = {p: entries["momentum_buffer"].clone() for p, entries in step.optimizer.state.items()}
    bias = step.model.fc_downstream.bias
    finite = bias.detach().clone()
    with torch.no_grad():
        bias[0] = torch.inf
    assert not step(*data[3])["loss"].isfinite()
    with torch.no_grad():
        bias.copy_(finite)
    assert all(torch.equal(p, before) for p, before in zip(step.model.parameters(), parameters, strict=True))
    assert all(torch.equal(step.optimizer.state[p]["momentum_buffer"], before) for p, before in moments.items())
    losses = trained(step, RATES[:2], data[4:])[0]
    assert all(0 < loss < 20 for loss in losses) and all(p.isfinite().all() for p in step.model.parameters())
    assert device.replays == (0 if not fused else 2 if at == 0 else 5)


OFFSET = torch.zeros(())


class Unbounded(TwinsAT):
    """A loss that may be infinite where its gradient is not."""

    def loss(self, logits, labels):
        return super().loss(logits, labels) + OFFSET


@pytest.mark.parametrize("scaled", [False, True])
def test_an_infinite_loss_with_finite_gradients_changes_no_parameter(device, tiny_model, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    step = made(tiny_model, scaler=scaler)
    step.method = Unbounded()
    for offset, moves in ((0.0, True), (torch.inf, False), (torch.inf, False), (0.0, True)):
        before = step.model.conv1.weight.detach().clone()
        OFFSET.fill_(offset)
        assert step(*next(batches(1)))["loss"].isfinite() == moves
        assert torch.equal(step.model.conv1.weight, before) != moves
    assert device.replays == 3


def test_a_gradient_scaler_is_part_of_the_step(device, monkeypatch, tiny_model):
    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)  # the first steps overflow
        return made(tiny_model, scaler=scaler, amp_dtype=torch.bfloat16)

    step, other = scaled(), scaled()
    rates, data = [0.1] * 12, list(batches(12))
    results = trained(step, rates, data)
    assert (device.captures, device.replays, step.reason) == (1, 11, "")
    assert_same(results, without_graph(monkeypatch, other, rates, data))
    assert step.scaler.get_scale() == other.scaler.get_scale() != 2.0**126


@pytest.mark.parametrize("engine", ["auto", "plan"])
def test_memory_that_runs_out_in_the_attack_of_a_capture(device, monkeypatch, tiny_model, engine):
    monkeypatch.setattr(cache, "executor_for", TorchExecutor)
    device.launches_left = 150
    step = made(tiny_model, engine=engine)
    with pytest.warns(UserWarning, match="training step runs without a CUDA graph: OutOfMemoryError") as told:
        results = trained(step)
    assert len(told) == 1 and device.captures == 2  # the attack has a graph of its own instead
    assert_same(results, without_graph(monkeypatch, made(tiny_model, engine=engine)))


def test_a_captured_plan_lives_as_long_as_the_graph_and_takes_turns(device, monkeypatch, tiny_model):
    monkeypatch.setattr(cache, "executor_for", TorchExecutor)
    step = made(tiny_model, engine="plan")
    trained(step)
    ended = device.log[-1][2]  # the event that the last step has recorded for others that use the plan
    device.log.clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        step.attack(*next(batches(1)))
        assert device.log[0] == (torch.cuda.current_stream(), "waits for", ended)
    (program,) = step.attack._cache.programs()
    kept = weakref.ref(program)
    del program
    step.attack.forget()
    gc.collect()
    assert kept() is not None
    step.forget()
    gc.collect()
    assert kept() is None


def test_labels_beyond_the_classes_are_refused_before_a_replay(device, tiny_model):
    step = made(tiny_model)
    trained(step)
    before = copy.deepcopy(step.model.state_dict())
    images, labels = next(batches(1))
    with pytest.raises(ValueError, match="labels hold class 3, but the model has 3 classes"):
        step(images, labels + (labels == labels.max()).long())
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())


def test_nan_gradients_are_counted_in_every_step(device, tiny_model):
    def attack(model):
        return PGD(model, steps=2, engine="eager")

    step = made(tiny_model, method="at", attack=attack)
    step.model.train()
    for rows in (8, 4, 8, 4):
        images, labels = next(batches(1, rows))
        step(images, labels)
        assert step.attack.nan_gradients == 0
    with torch.no_grad():
        step.model.fc_downstream.weight[0, 0] = torch.nan
    for rows in (8, 4):
        images, labels = next(batches(1, rows))
        with pytest.warns(UserWarning, match="were NaN"):
            step(images, labels)
        assert step.attack.nan_gradients == 2 * images.numel()
    assert (device.captures, device.replays) == (2, 4)


def hooked(step):
    step.model.bn1.register_forward_hook(lambda *_: None)


def hooked_parameter(step):
    step.model.conv1.weight.register_hook(lambda g: g)


def hooked_accumulation(step):
    step.model.conv1.weight.register_post_accumulate_grad_hook(lambda p: None)


def hooked_optimizer(step):
    step.optimizer.register_step_post_hook(lambda *_: None)


def wrapped(step):
    step.model = step.attack.model = nn.DataParallel(step.model)


def compiled(step):
    step.model.bn1 = torch.compile(step.model.bn1, backend="eager")


def compiled_in_place(step):
    step.model.bn1.compile(backend="eager")


def own_attack(step):
    attack = step.attack
    step.attack = lambda images, labels, x_init: attack(images, labels, x_init)


def attack_of_another(step):
    step.attack = PGD(copy.deepcopy(step.model), steps=1, engine="eager")


def unfused(step):
    step.optimizer = torch.optim.SGD(step.model.parameters())


def damped(step):
    step.optimizer = torch.optim.SGD(step.model.parameters(), momentum=0.9, dampening=0.1, fused=True)


def uncapturable(step):
    step.optimizer = torch.optim.Adam(step.model.parameters(), fused=True)


def another_optimizer(step):
    step.optimizer = torch.optim.RMSprop(step.model.parameters())


OBSTACLES = {
    hooked: "module 'bn1' has hooks", hooked_parameter: "conv1.weight has hooks",
    hooked_accumulation: "conv1.weight has hooks", hooked_optimizer: "the optimiser has hooks",
    wrapped: "the model is a DataParallel", compiled: "module 'bn1' is compiled",
    compiled_in_place: "module 'bn1' is compiled",
    own_attack: "the attack is a function, not a PGD of this model",
    attack_of_another: "the attack is a PGD, not a PGD of this model",
    unfused: "fused=True", damped: "dampening", uncapturable: "capturable=True", another_optimizer: "is a RMSprop",
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda f: f.__name__)
def test_what_is_never_captured_trains_all_the_same(device, monkeypatch, tiny_model, obstacle):
    step, other = made(tiny_model), made(tiny_model)
    obstacle(step), obstacle(other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph")
        results = trained(step)
    assert OBSTACLES[obstacle] in step.reason and device.captures == 0
    assert_same(results, without_graph(monkeypatch, other))


def test_a_step_inside_of_autocast_is_not_captured(device, tiny_model):
    step = made(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        trained(step)
    assert "amp_dtype" in step.reason and device.captures == 0


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_adam_is_captured(device, monkeypatch, tiny_model, amp_dtype):
    def adam(parameters):
        return torch.optim.AdamW(parameters, fused=True, capturable=True)

    rates = [1e-3, 1e-2, 3e-3, 1e-3, 1e-4]
    step = made(tiny_model, optimizer=adam, amp_dtype=amp_dtype)
    results = trained(step, rates)
    assert (device.captures, device.replays) == (1, 4)
    assert_same(results, without_graph(monkeypatch, made(tiny_model, optimizer=adam, amp_dtype=amp_dtype), rates))


def test_options_are_checked(tiny_model):
    with pytest.raises(ValueError, match="unknown method 'fgsm'"):
        made(tiny_model, "at").__class__(tiny_model, None, method="fgsm")
    with pytest.raises(ValueError, match="unknown amp_dtype"):
        made(tiny_model, amp_dtype=torch.float64)
    assert isinstance(TrainingStep(tiny_model, None, method="at").attack, PGD)
    assert TrainingStep(tiny_model, None, method="standard").attack is None
