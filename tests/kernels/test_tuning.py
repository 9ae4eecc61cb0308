"""How block sizes are chosen, on a device that is made up, and remembered."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from twins_fast.kernels import capture, tuning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINS_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path / "cache"


CONFIGS = tuning.CANDIDATES["apply"]


def test_choices_survive_the_process(folder):
    assert tuning.load("NVIDIA H200") == {}
    tuning.save("NVIDIA H200", {"a": CONFIGS[1]})
    tuning.save("NVIDIA H200", {"b": CONFIGS[2]})  # as another process would, which had not read the first one
    assert tuning.load("NVIDIA H200") == {"a": CONFIGS[1], "b": CONFIGS[2]}
    assert [file.name for file in folder.iterdir()] == ["triton-NVIDIA-H200.json"]
    assert tuning.load("NVIDIA A100") == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, 2, 3, 4]}', "\udcff"])
def test_foreign_and_corrupt_files_are_ignored(folder, text):
    file = tuning.path("GPU")
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert tuning.load("GPU") == {}
    tuning.save("GPU", {"b": CONFIGS[0]})
    assert tuning.load("GPU") == {"b": CONFIGS[0]}


def test_an_unwritable_folder_is_ignored(folder):
    folder.write_text("a file where the folder should be")
    tuning.save("GPU", {"a": CONFIGS[0]})
    assert tuning.load("GPU") == {}


def test_files_are_never_seen_half_written(folder):
    configs = {f"problem {i}": CONFIGS[i % 2] for i in range(200)}
    tuning.save("GPU", configs)
    threads = [threading.Thread(target=tuning.save, args=("GPU", configs)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert tuning.load("GPU") == configs
    assert len(list(folder.iterdir())) == 1


class Large:
    """A CUDA tensor, as far as the choice looks at it."""

    device = torch.device("cuda")

    def __init__(self, numel=2**20):
        self.numel = lambda: numel


def choose(kind="a", x=None):
    return tuning.choose("apply", kind, x or Large(), None, ())


@pytest.fixture
def measured(monkeypatch, folder):
    """What was measured; the last candidate is the fastest."""
    calls = []

    def fastest(candidates, launch, tensors):
        calls.append(candidates)
        return candidates[-1]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "fastest", fastest)
    return calls


def test_measures_once(measured):
    assert [choose(), choose()] == [CONFIGS[-1]] * 2
    tuning._chosen.clear()  # another process reads the file
    assert choose() == CONFIGS[-1]
    assert measured == [CONFIGS]
    choose("b")
    assert measured == [CONFIGS] * 2


def test_measures_nothing_for_small_tensors_in_deterministic_mode_and_during_a_capture(measured, monkeypatch):
    assert choose(x=Large(2**10)) == CONFIGS[0]
    torch.use_deterministic_algorithms(True)
    try:
        assert choose() == CONFIGS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose() == CONFIGS[0]
    assert not measured
    assert choose() == CONFIGS[-1]  # the default was not remembered
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == CONFIGS[-1]  # what is known is used
    assert len(measured) == 1


class Device:
    """A CUDA device whose kernels take as long as a test says.

    Attributes:
        clock: milliseconds; work advances it when it is queued.
        work: (candidate, tensors) as it was done.
        graph: that is being captured, a list of work.
        events: what happened besides.
    """

    cache_bytes, free_bytes = 4096, 2**30

    def __init__(self, milliseconds):
        self.milliseconds = milliseconds
        self.clock, self.work, self.graph, self.events, self.stream = 0.0, [], None, [], "current"

    def launch(self, candidate, *tensors):
        if self.graph is not None:
            self.graph.append((candidate, tensors))
            return
        self.work.append((candidate, tensors))
        self.clock += self.milliseconds(candidate)

    def install(self, monkeypatch):
        device = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert device.graph is None and device.stream == "side" and capture_error_mode == "thread_local"
                device.graph = self.work = []

            def capture_end(self):
                device.graph = None

            def replay(self):
                assert device.stream == "current"
                device.events.append("replay")
                for candidate, tensors in self.work:
                    device.launch(candidate, *tensors)

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = device.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        @contextmanager
        def stream(other):
            before, device.stream = device.stream, other
            try:
                yield
            finally:
                device.stream = before

        fakes = {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda: "side",
            "stream": stream,
            "graph_pool_handle": lambda: (0, 7),
            "synchronize": lambda: device.events.append("synchronize"),
            "_sleep": lambda _: device.events.append("sleep"),
            "current_device": lambda: 0,
            "mem_get_info": lambda: (device.free_bytes, 2**40),
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=device.cache_bytes),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, capture.END_OF_POOL, lambda *a: device.events.append(("end", *a)))
        monkeypatch.setattr(capture, "_abandoned", [])
        return Graph


@pytest.fixture
def device(monkeypatch):
    device = Device(lambda candidate: {"slow": 2.0, "fast": 1.0, "other": 3.0}[candidate])
    device.Graph = device.install(monkeypatch)
    return device


CANDIDATES = ["slow", "fast", "other"]


def addresses(tensors):
    return tuple(t.data_ptr() for t in tensors if t is not None)


def test_copies_of_the_tensors_take_turns(device):
    tensors = torch.arange(100.0), None, torch.ones(56)  # 624 bytes
    assert tuning.fastest(CANDIDATES, device.launch, tensors) == "fast"
    work = [t for candidate, t in device.work if candidate == "fast"]
    sets = {addresses(t): t for t in work}
    assert addresses(tensors) in sets
    assert 2 * device.cache_bytes < 624 * len(sets) <= 2 * device.cache_bytes + 624
    assert len({address for each in sets for address in each}) == 2 * len(sets)
    assert all(torch.equal(t[0], tensors[0]) and t[1] is None for t in work)
    timed = [addresses(t) for t in work[2:]]  # after those that compile
    rounds = [timed[i : i + 16] for i in range(0, len(timed), 16)]
    assert len(rounds) == tuning._ROUNDS
    for each in rounds:  # the one that was used longest ago comes next
        assert all(address not in each[i + 1 : i + len(sets)] for i, address in enumerate(each))


def test_tensors_larger_than_the_cache_are_not_copied(device):
    x = torch.ones(2049)
    tuning.fastest(CANDIDATES, device.launch, (x,))
    assert {addresses(t) for _, t in device.work} == {(x.data_ptr(),)}


def test_few_copies_where_memory_is_short(device):
    x = torch.ones(16)  # 64 bytes, 128 of which would fill the caches
    tuning.fastest(CANDIDATES, device.launch, (x,))
    assert len({addresses(t) for _, t in device.work}) == 1 + tuning._MOST_COPIES
    device.work.clear()
    device.free_bytes = 4 * 64 * 3
    tuning.fastest(CANDIDATES, device.launch, (x,))
    assert len({addresses(t) for _, t in device.work}) == 1 + 3


def test_memory_that_runs_out_means_fewer_copies(device, monkeypatch):
    clone, copies = torch.Tensor.clone, []

    def limited(t):
        if len(copies) == 2:
            raise torch.OutOfMemoryError
        copies.append(clone(t))
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "clone", limited)
    assert tuning.fastest(CANDIDATES, device.launch, (torch.ones(16),)) == "fast"
    assert len({addresses(t) for _, t in device.work}) == 3


def test_candidates_are_timed_side_by_side_and_the_least_time_counts(device):
    times = {"slow": [5, 5, 5, 5, 5], "fast": [9, 9, 4, 9, 9], "other": [6, 6, 6, 6, 6]}
    order = []

    def milliseconds(candidate):
        if device.events[-1:] != ["replay"]:
            return 0.0  # compiles
        if not order or order[-1] != candidate:
            order.append(candidate)
        return times[candidate][(len(order) - 1) // 3]

    device.milliseconds = milliseconds
    assert tuning.fastest(CANDIDATES, device.launch) == "fast"
    assert order == CANDIDATES * 5
    assert device.events == ["synchronize"] * 3 + ["sleep", "replay"] * 15


@pytest.mark.parametrize("when", ["compiled", "timed"])
def test_a_candidate_that_fails_is_left_out(device, when):
    def launch(candidate, *tensors):
        if candidate == "fast" and (when == "compiled" or len(device.work) > 10):
            raise RuntimeError("out of resources")
        device.launch(candidate, *tensors)

    if when == "timed":
        device.Graph.capture_begin = None  # so that Python launches what is timed
    assert tuning.fastest(CANDIDATES, launch) == "slow"
    assert device.graph is None and device.stream == "current"
    if when == "compiled":
        assert {candidate for candidate, _ in device.work} == {"slow", "other"}


def test_the_first_one_if_all_fail(device):
    assert tuning.fastest(CANDIDATES, None) == "slow"


@pytest.mark.parametrize("fails", ["begin", "launch", "end"])
def test_without_a_graph_queued_launches_are_timed(device, fails):
    """A capture that fails is ended, and the allocator told, before anything else is launched."""

    def end(graph):
        device.graph = None
        device.events.append("end of the capture")
        if fails == "end":
            raise RuntimeError("operation failed due to a previous error during capture")

    def launch(candidate, *tensors):
        if fails == "launch" and device.graph is not None:
            raise RuntimeError("not permitted when stream is capturing")
        device.launch(candidate, *tensors)

    device.Graph.capture_end = end
    if fails == "begin":
        device.Graph.capture_begin = None
    assert tuning.fastest(CANDIDATES, launch) == "fast"
    assert device.graph is None and device.stream == "current" and len(capture._abandoned) == 3
    ended = [] if fails == "begin" else ["end of the capture"]
    assert device.events == ["synchronize", *ended, ("end", 0, (0, 7))] * 3 + ["sleep"] * 15
    assert len(device.work) == 3 * (2 + 5 * 16)


def test_an_allocator_that_knows_that_the_capture_has_ended(device, monkeypatch):
    def end(*_):
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, capture.END_OF_POOL, end)
    device.Graph.capture_begin = None
    assert tuning.fastest(CANDIDATES, device.launch) == "fast"
