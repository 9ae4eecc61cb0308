"""Attacks as CUDA graphs, on a device that is emulated."""

import warnings

import pytest
import torch
from torch import nn

from tests.graph_emulator import Device
from twins_fast import PGD
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
