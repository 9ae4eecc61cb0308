"""Attacks as CUDA graphs, on a device that is emulated."""

import warnings

import pytest
import torch
from torch import nn

from tests.graph_emulator import Device
from twins_fast import PGD, accelerate
from twins_fast.attacks.engine import cache, cuda_graph, program
from twins_fast.attacks.engine.cuda_graph import KEPT, Graphs
from twins_fast.attacks.engine.executors.torch import TorchExecutor


@pytest.fixture
def device(monkeypatch):
    """Attacks on the CPU go through graphs."""
    monkeypatch.setattr(cache, "executor_for", TorchExecutor)
    return Device(monkeypatch)


def planned(model, **options):
    return PGD(model, **{"steps": 2, "random_start": False, "engine": "plan", **options})


def program_of(attack):
    (only,) = attack._cache.programs()
    return only


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_graphs_replay_with_what_is_new(device, loss, tiny_model, batch):
    attack, plain = planned(tiny_model, loss=loss), planned(tiny_model, loss=loss, engine="eager")

    def check(images, labels):
        start = 0.98 * images  # where KL has a gradient
        adversarial = attack(images, labels, start)
        assert (adversarial - plain(images, labels, start)).abs().max() < 1e-6
        return adversarial

    images, labels = batch
    for i in range(3):
        with torch.no_grad():
            tiny_model.conv1.weight.mul_(1.1)
        check(images.roll(i, 0), labels.roll(i))
    assert (device.captures, device.replays) == (1, 2)
    check(images[:3], labels[:3])
    adversarial = check(images[2:5], labels[2:5])
    assert (device.captures, device.replays) == (2, 3)
    before = adversarial.clone()
    check(images[3:6], labels[3:6])
    assert torch.equal(adversarial, before)
    tiny_model.conv1.weight = nn.Parameter(-tiny_model.conv1.weight.detach())
    check(images, labels)
    attack.alpha = plain.alpha = 0.001
    check(images, labels)
    assert device.captures == 4


@pytest.mark.parametrize(
    "options",
    [
        {"best": True, "loss": "margin"},
        {"step_rule": "apgd", "steps": 5, "loss": "dlr"},
        {"restarts": 3, "random_start": True, "momentum": 0.9},
        {"norm": "l1", "eps": 3.0, "alpha": 1.0},
        {"bounds": (-1, 2)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_options_that_need_no_look_are_one_graph(device, tiny_model, batch, options):
    attack, plain = planned(tiny_model, **options), planned(tiny_model, **options, engine="eager")
    for i in range(3):
        images, labels = batch[0].roll(i, 0), batch[1].roll(i)
        results = []
        for one in (attack, plain):
            torch.manual_seed(i)
            results.append(one(images, labels))
        assert ((results[0] - results[1]).abs() > 1e-5).float().mean() < 5e-3
    assert (device.captures, device.replays) == (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"early_stop": True},
        {"loss": lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none")},
        {"eps": torch.full((8, 1, 1, 1), 0.03)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_attacks_that_look_between_passes_have_graphs_of_passes(device, tiny_model, batch, options):
    attack, plain = planned(tiny_model, **options), planned(tiny_model, **options, engine="eager")
    images, _ = batch
    labels = tiny_model.eval()(images).argmax(1)
    for _ in range(2):
        assert ((attack(images, labels) - plain(images, labels)).abs() > 1e-5).float().mean() < 5e-3
    assert device.captures == 2 and device.replays == 6  # of two attacks with two passes each, forward and backward


def test_an_accelerated_network_replays_its_passes(device, tiny_model, batch):
    fast, images = accelerate(tiny_model.eval()), batch[0]

    def check(x):
        ends = [(network(leaf), leaf) for network in (fast, tiny_model) for leaf in [x.clone().requires_grad_()]]
        (own, leaf), (expected, other) = ends
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
        fast(x.flip(0).requires_grad_())  # another one before the backward pass
        gradients = [torch.autograd.grad(logits[:, 1].sum(), x)[0] for logits, x in ends]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
        return own

    first = check(images)
    before = first.clone()
    check(images.flip(2))
    assert torch.equal(first, before) and (device.captures, device.replays) == (2, 4)
    with torch.no_grad():
        tiny_model.conv1.weight.mul_(-1)
    check(images)  # folded anew, into the addresses of the graphs
    assert device.captures == 2
    for rows in (7, 5, 6):
        check(images[:rows])
    with torch.no_grad():
        torch.testing.assert_close(fast(images), tiny_model(images), rtol=1e-4, atol=1e-5)


def test_few_graphs_are_kept_and_none_outlives_its_memory(device, tiny_model, batch):
    attack = planned(tiny_model)
    attack(*batch)
    for rows in range(1, KEPT + 2):
        attack(batch[0][:rows], batch[1][:rows])
    graphs = program_of(attack)._graphs
    assert len(graphs._captured) == KEPT and device.captures == KEPT + 2
    program_of(attack).free()
    assert not graphs._captured


def test_a_capture_that_fails_is_told_once(device, tiny_model, batch, monkeypatch):
    attack, expected = planned(tiny_model), planned(tiny_model, engine="eager")(*batch)
    fold, stream = program.Program.fold, torch.cuda.current_stream()
    monkeypatch.setattr(program.Program, "fold", lambda self, model: (device.wait(), fold(self, model)))
    with pytest.warns(UserWarning, match="attack runs without a CUDA graph: RuntimeError: a wait:") as told:
        adversarial = attack(*batch)
    assert len(told) == 1 and program_of(attack)._graphs.reason.startswith("RuntimeError: a wait")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attack(*batch), adversarial)
    assert device.captures == 1 and device.replays == 0 and (adversarial - expected).abs().max() < 1e-6
    assert torch.cuda.current_stream() is stream and device.ended == [(0, 1)]


@pytest.mark.parametrize("launches", [5, 100])  # in the fold, in the steps
def test_memory_that_runs_out_in_a_capture_makes_chunks_smaller_and_graphs_stay(device, tiny_model, batch, launches):
    attack = planned(tiny_model)
    expected = planned(tiny_model, engine="eager")(*batch)
    device.launches_left = launches
    with pytest.warns(UserWarning, match="memory ran out with 8 images at once; continuing with 4") as told:
        assert (attack(*batch) - expected).abs().max() < 1e-6
    assert len(told) == 1 and program_of(attack)._arena is None  # freed, and after the capture
    for _ in range(3):
        assert (attack(*batch) - expected).abs().max() < 1e-6
    assert (device.captures, device.replays) == (2, 2) and device.ended == [(0, 1)]
    assert program_of(attack).largest_chunk == 4 and program_of(attack)._graphs.reason == ""


def test_memory_that_never_suffices_for_a_capture(device, tiny_model, batch):
    images, labels = batch[0][:1], batch[1][:1]
    attack, expected = planned(tiny_model), planned(tiny_model, engine="eager")(images, labels)
    device.launches_left = 5
    with pytest.warns(UserWarning, match="without a CUDA graph: OutOfMemoryError"):
        attack(images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (attack(images, labels) - expected).abs().max() < 1e-6
    assert device.captures == 1 and "out of memory" in program_of(attack)._graphs.reason
    attack(*batch), attack(*batch)
    assert (device.captures, device.replays) == (2, 1)


@pytest.mark.parametrize("graphless", [False, True])
def test_attacks_on_two_streams_wait_for_each_other(device, tiny_model, batch, graphless, monkeypatch):
    """They share an arena."""
    attack = planned(tiny_model)
    if graphless:
        monkeypatch.setattr(Graphs, "_capture", lambda self, *arguments: self._stop("for the test"))
        with pytest.warns(UserWarning, match="for the test"):
            attack(*batch)
    else:
        attack(*batch)
    ended = device.log[-1][2]  # the event that the attack before has recorded
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        device.log.clear()
        with torch.cuda.stream(stream):
            attack(*batch)
        first, (_, last, event) = device.log[0], device.log[-1]
        assert first == (stream, "waits for", ended) and last == "records"
        ended = event
    assert device.replays == (0 if graphless else 2)


def test_what_changes_from_call_to_call_is_not_captured_for_ever(device, tiny_model, batch):
    attack = planned(tiny_model)
    with pytest.warns(UserWarning, match="changes from call to call"):
        for i in range(cuda_graph.RESTLESS + 3):
            attack.alpha = 0.001 * i
            attack(*batch)
    assert device.captures == cuda_graph.RESTLESS and device.replays == 0


def test_random_numbers_of_the_cpu_are_not_baked_in(device):
    graphs = Graphs(torch.device("cpu"), "function")
    x = torch.zeros(3)

    def call():
        (y,) = graphs(lambda: 0, lambda x: (x + torch.rand(3),), (x,), list, lambda: False)
        return y

    torch.manual_seed(0)
    expected = [torch.rand(3) for _ in range(3)]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"random numbers on the CPU \(torch\)"):
        drawn = [call() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True)) and device.replays == 0


def test_the_emulator_shows_what_is_baked_in(device):
    graphs, x, factor = Graphs(torch.device("cpu"), "function"), torch.ones(2), 1.0

    def call():
        (y,) = graphs(lambda: 0, lambda x: (x * factor,), (x,), list, lambda: False)
        return y.tolist()

    assert call() == [1, 1]
    x.fill_(3)
    factor = 2.0
    assert call() == [3, 3] and device.replays == 1
