"""The benchmark harness: nothing wrong is timed, nothing is dropped, bytes are counted right."""

import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import resnet50

from bench import (
    attack,
    children,
    coverage,
    drop_in,
    dynamics,
    harness,
    header,
    libraries,
    networks,
    peers,
    report,
    third_party,
    twin_bn,
    workloads,
    zoos,
)  # fmt: skip
from bench.twin_bn import Layer
from twins_fast import PGD
from twins_fast.models import ARCHITECTURES, CifarResNet
from twins_fast.ops import native, oracle

SMALL = Layer("small", 2, (4, 3, 2, 2), 2, True, True)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Two sets of operands are enough, and few values are checked at a time."""
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 1)
    monkeypatch.setattr(oracle, "AT_ONCE", 32)


def measured(monkeypatch, function, layer=SMALL, **kwargs):
    """The row of a peer that computes ``function``, beside the published one."""

    def build(layer, inputs):
        return twin_bn.runner(layer, inputs, function)

    monkeypatch.setitem(harness.PEERS["twin_bn"], "mine", harness.Peer(build, ("cpu",)))
    return harness.measure(twin_bn.BENCHMARK, layer, "cpu", ["published", "mine"], 1, **kwargs)


def wings_swapped(x, residual, split, frozen, adaptive, relu):
    return twin_bn.as_published(x, residual, split, adaptive, frozen, relu)


def one_value_off(x, residual, split, frozen, adaptive, relu):
    y = twin_bn.as_published(x, residual, split, frozen, adaptive, relu)
    return y + (0.1 * (torch.arange(y.numel()).view(y.shape) == y.numel() - 1)).to(y.dtype)


def biased_gradient(x, residual, split, frozen, adaptive, relu):
    y = twin_bn.as_published(x, residual, split, frozen, adaptive, relu)
    bias = frozen.bias.view(-1, 1, 1)
    return y + (0.5 * (bias - bias.detach())).to(y.dtype)


def not_finite(x, residual, split, frozen, adaptive, relu):
    return twin_bn.as_published(x, residual, split, frozen, adaptive, relu) * torch.nan


@pytest.mark.parametrize("function", [wings_swapped, one_value_off, biased_gradient, not_finite])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_peer_is_reported_and_not_timed(function, dtype, monkeypatch):
    layer = Layer("small", 1, (4, 3, 9, 9), 2, True, True, dtype)
    row = measured(monkeypatch, function, layer)
    assert "times" in row["peers"]["published"]
    mine = row["peers"]["mine"]
    assert mine["status"] == "wrong" and "times" not in mine
    assert mine["error"]["times_allowed"] is None or mine["error"]["times_allowed"] > 1
    assert mine["error"]["result"] in mine["reason"]
    assert f"mine {'':17} wrong: {mine['reason']}" in harness.table(row)
    assert harness.fails([row]) == [f"small: mine wrong: {mine['reason']}"]


@pytest.mark.parametrize(("check", "status"), [(None, "ok"), (twin_bn.check, "wrong")])
def test_a_peer_may_have_a_check_of_its_own(check, status, monkeypatch):
    """Kernels round once, and PyTorch after every operation."""
    layer = Layer("small", 1, (4, 3, 9, 9), 2, True, True)

    def build(layer, inputs):
        return replace(twin_bn.runner(layer, inputs, twin_bn.as_published), check=check)

    monkeypatch.setitem(harness.PEERS["twin_bn"], "mine", harness.Peer(build, ("cpu",)))
    row = harness.measure(twin_bn.BENCHMARK, layer, "cpu", ["mine"], 1)
    assert row["peers"]["mine"]["status"] == status


def test_a_raising_peer_is_reported_with_its_reason(monkeypatch):
    def raising(*args):
        raise RuntimeError("no such kernel\nand more")

    row = measured(monkeypatch, raising)
    assert row["peers"]["mine"] == {"status": "error", "reason": "RuntimeError: no such kernel"}
    assert "times" in row["peers"]["published"]


def test_a_peer_that_raises_later_is_reported_too(monkeypatch):
    calls = []

    def tired(*args):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("tired")
        return twin_bn.as_published(*args)

    row = measured(monkeypatch, tired)
    assert row["peers"]["mine"] == {"status": "error", "reason": "RuntimeError: tired"}


def test_a_dead_device_is_reported_with_what_led_to_it(monkeypatch):
    def raising(*args):
        raise RuntimeError("illegal access")

    def dead(*args):
        raise RuntimeError("device lost")

    monkeypatch.setattr(harness, "interleave", dead)
    with pytest.raises(RuntimeError, match="mine error: RuntimeError: illegal access; small: RuntimeError: device los"):
        measured(monkeypatch, raising)


def test_an_unavailable_peer_is_reported_with_its_reason(monkeypatch):
    def build(layer, inputs):
        raise harness.Unavailable("not built")

    monkeypatch.setitem(harness.PEERS["twin_bn"], "mine", harness.Peer(build, ("cpu",)))
    row = harness.measure(twin_bn.BENCHMARK, SMALL, "cpu", ["published", "mine", "compile-max-autotune"], 1)
    assert row["peers"]["mine"] == {"status": "unavailable", "reason": "not built"}
    assert row["peers"]["compile-max-autotune"]["reason"] == "runs on cuda only"
    assert harness.fails([row]) == []


def test_a_stage_alone(monkeypatch):
    row = measured(monkeypatch, twin_bn.as_published, stage="backward")
    assert list(row["peers"]["mine"]["times"]) == ["forward", "backward"]  # the forward pass comes along
    row = measured(monkeypatch, twin_bn.as_published, stage="both")
    assert list(row["peers"]["mine"]["times"]) == ["both"]


def test_bytes_of_one_layer_by_hand():
    # x: 4 x 3 x 2 x 2 bfloat16 = 96 bytes, half of it adaptive; 48 signs = 6 bytes; vectors of 3 float32 = 12 bytes.
    forward = 96 + 96 + 48 + 96 + 6 + 12 * 12  # x, residual, adaptive half, y, bits; 8 vectors read, 4 written
    backward = 96 + 96 + 48 + 48 + 6 + 96 + 96 + 10 * 12  # dy, x, halves, bits, dx, dresidual; 6 read, 4 written
    assert twin_bn.floor(SMALL) == {"forward": forward, "backward": backward, "both": forward + backward}
    plain = Layer("plain", 1, (4, 3, 2, 2), 1, False, False, "float32")
    assert twin_bn.floor(plain)["forward"] == 192 + 144 + 192 + 144
    assert twin_bn.floor(plain)["backward"] == 3 * 192 + 2 * 144 + 120


@pytest.mark.parametrize(("resolution", "largest"), [(224, (64, 112, 112)), (32, (64, 16, 16))])
def test_layers_are_those_of_resnet50(resolution, largest):
    layers = twin_bn.layers(resolution, 32)
    assert sum(layer.count for layer in layers) == 53
    assert len({layer.name for layer in layers}) == len(layers)
    assert (32, *largest) in {layer.shape for layer in layers}
    each = [layer for layer in layers for _ in range(layer.count)]
    kinds = Counter((layer.add, layer.relu) for layer in each)
    assert kinds == {(False, True): 33, (True, True): 16, (False, False): 4}  # 16 blocks, 4 with a downsample branch
    assert all(layer.split == 16 for layer in layers)
    norms = [m for m in resnet50().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sorted(m.num_features for m in norms) == sorted(layer.shape[1] for layer in each)


def test_memory_of_a_known_function():
    image = torch.zeros(1000)
    chain = {"forward": lambda x: (x + 1, x), "backward": lambda state: (state[0] + state[1] + 1).sum()}
    used = harness.memory(chain, image, "cpu")
    assert 4000 <= used["kept"] < 4100
    assert 12000 <= used["peak"] < 12200  # x + 1, its sum with x, and that plus 1


def test_rotated_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 4000)
    assert len(harness.cold_sets(lambda: (torch.zeros(100), None), "cpu")) == 30
    assert len(harness.cold_sets(lambda: (torch.zeros(10_000),), "cpu")) == 2
    monkeypatch.setattr(harness, "free_memory", lambda device: 8000)
    assert len(harness.cold_sets(lambda: (torch.zeros(100),), "cpu")) == 2


def test_the_command_and_its_file(tmp_path, monkeypatch, capsys):
    arguments = [
        "--device",
        "cpu",
        "--resolution",
        "32",
        "--shapes",
        "2048x1x1/bn+add",
        "--batch",
        "4",
        "--rounds",
        "2",
    ]
    arguments += ["--peers", "published,eager-amp,cpp", "--out", str(tmp_path)]
    assert twin_bn.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "[1/1] 32/2048x1x1/bn+add+relu x 3" in printed and "| published |" in printed
    content = json.loads((tmp_path / "twin_bn-cpu.json").read_text())
    assert content["command"] == " ".join(["python -m bench.twin_bn", *arguments])
    assert set(content["header"]) == set(header.header())
    (row,) = content["workloads"]
    times = row["peers"]["eager-amp"]["times"]
    assert set(times) == {"forward", "backward", "both"}
    for stage, t in times.items():
        assert t["q1"] <= t["median"] <= t["q3"] and t["samples"] == 2 * row["peers"]["eager-amp"]["sets"]
        assert t["bandwidth"] * t["median"] == pytest.approx(row["floor_bytes"][stage])
        assert t["times_floor"] * t["bandwidth"] == pytest.approx(row["copy"]["bandwidth"])
    assert row["peers"]["cpp"]["status"] == ("unavailable" if native._C is None else "ok")
    assert json.loads(json.dumps(content)) == content

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "| 3 layers at 32 px, batch 4, bfloat16 | forward | backward | both |" in report.twin_bn()
    monkeypatch.setitem(report.TABLES, "twin_bn", report.twin_bn)
    filled = report.filled("<!-- table twin_bn -->\n<!-- end -->")
    assert filled == f"<!-- table twin_bn -->\n{report.twin_bn()}\n<!-- end -->"


def test_a_part_does_not_replace_the_whole(monkeypatch):
    folders = []

    class Stop(Exception):
        pass

    def record(*args):
        folders.append(args[-1])
        raise Stop

    monkeypatch.setattr(twin_bn, "Record", record)
    monkeypatch.setattr(twin_bn, "layers", lambda *args: [SMALL])
    parts = [["--quick"], ["--batch", "8"], ["--peers", "cpp"], ["--dtype", "float32"], ["--resolution", "32"]]
    parts.append(["--rounds", "3"])
    for arguments in ([], ["--rounds", "8"], *parts):
        with pytest.raises(Stop):
            twin_bn.main(["--device", "cpu", *arguments])
    assert folders == [harness.RESULTS] * 2 + [harness.PARTIAL] * len(parts)


def test_totals_count_every_layer_and_name_failures():
    def row(seconds, **other):
        times = {"both": {"median": seconds}}
        peers = {"a": {"status": "ok", "times": times, "memory": {"kept": 5}}, "b": {"status": "wrong"} | other}
        return {"name": "32/x", "count": 3, "floor_bytes": {"both": 10}, "copy": {"bandwidth": 10.0}, "peers": peers}

    sums = twin_bn.totals([row(2.0), row(4.0)])
    assert sums["a"] == {"seconds": {"both": 18.0}, "times_floor": {"both": 3.0}, "kept": 30}
    assert sums["b"] == {"failed": "wrong on 2 of 2 layers"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        twin_bn.main(["--device", "cuda"])
    assert "no CUDA device here" in capsys.readouterr().err


def test_sanitize_passes_and_fails(monkeypatch, capsys):
    from bench import sanitize
    from twins_fast.qualify import checks

    monkeypatch.setattr(sanitize, "SHAPES", [(2, 3, 3, 1)])
    monkeypatch.setattr(sanitize, "DTYPES", [torch.float32])
    monkeypatch.setattr(sanitize, "backend", type("", (), {"use_backend": lambda name: harness.nullcontext()}))
    monkeypatch.setattr(sys, "argv", ["sanitize", "--backends", "cpp"])
    assert sanitize.main() == 0 and ": 0 wrong" in capsys.readouterr().out
    twin_batch_norm = checks.twin_batch_norm
    monkeypatch.setattr(checks, "twin_batch_norm", lambda *args: twin_batch_norm(*args) * 1.01)
    assert sanitize.main() == 1 and "y is off by" in capsys.readouterr().out


TINY = "resnet18-32:batch=4:width=4:side=8"


class StandIn(PGD):
    """The attack with whatever engine it has here."""

    def __init__(self, *args, engine, **options):
        super().__init__(*args, **options)
        assert engine in ("auto", "eager", "plan")

    def explain(self, images, labels=None, timed=False):
        layer = {"name": "conv1", "op": "conv", "runs": "native", "forward_ms": 1.0, "backward_ms": 2.0}
        return SimpleNamespace(engine="plan", images=1, layers=[layer | {"operations": 100, "bytes": 1000}])


@pytest.fixture
def tiny_attack(monkeypatch):
    """The stand-in, small yardsticks, and no process of its own to measure memory in."""
    monkeypatch.setattr(peers, "PGD", StandIn)
    monkeypatch.setattr(attack, "COPIED", 64)
    monkeypatch.setattr(harness, "PRODUCTS", {"cpu": (8,)})
    monkeypatch.setattr(
        attack, "child_memory", lambda benchmark, name, attacks, device: [{"peak": 1000000}] * len(attacks)
    )


def attacked(monkeypatch, change, dtype=None):
    """The row of a peer whose result is what ``change`` makes of the published one."""

    def build(workload, inputs):
        def function(images, labels, start, steps):
            return change(peers.published_attack(inputs.model, images, labels, start, steps), images)

        return peers.runner(workload, inputs, function, dtype)

    monkeypatch.setitem(harness.PEERS["attack"], "mine", harness.Peer(build, ("cpu",)))
    return harness.measure(attack.BENCHMARK, workloads.workload(TINY, steps=2), "cpu", ["published", "mine"], 1)


@pytest.mark.parametrize(
    ("change", "dtype", "what"),
    [
        (lambda x, images: images, None, "loss"),
        (lambda x, images: images, torch.bfloat16, "loss"),
        (lambda x, images: torch.cat([x[:-1], images[-1:]]), None, "loss"),
        (lambda x, images: (images + 1.1 * (x - images)).clamp(0, 1), None, "budget"),
        (lambda x, images: x - 2 * (x.amax() - 0.5), None, "budget"),
        (lambda x, images: x * torch.nan, torch.bfloat16, "budget"),
    ],
)
def test_a_wrong_attack_is_reported_and_not_timed(change, dtype, what, monkeypatch, tiny_attack):
    mine = attacked(monkeypatch, change, dtype)["peers"]["mine"]
    assert mine["status"] == "wrong" and "times" not in mine and mine["reason"].startswith(what)


def test_a_right_attack_is_timed_against_the_floor(monkeypatch, tiny_attack):
    row = attacked(monkeypatch, lambda x, images: x)
    mine = row["peers"]["mine"]
    assert mine["status"] == "ok" and mine["agreement"] == 1 and mine["first_seconds"] > 0
    timed = mine["times"]["attack"]
    assert timed["samples"] == 1 and timed["operations"] * timed["median"] == pytest.approx(
        row["floor_operations"]["attack"]
    )
    limits = (row["floor_bytes"]["attack"] / row["copy"]["bandwidth"], 
              row["floor_operations"]["attack"] / row["peak"]["operations"])  # fmt: skip
    assert timed["times_floor"] == pytest.approx(timed["median"] / max(limits))


def test_cost_of_one_attack_by_hand(monkeypatch):
    network = workloads.Network(lambda width: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False)), 2, 5)
    monkeypatch.setitem(workloads.NETWORKS, "one", network)
    workload = workloads.workload("one", steps=3)  # 4 x 3 x 3 results of 27 products, 75 inputs, 108 weights
    assert workloads.cost(workload) == (3 * 2 * 2 * 2 * 36 * 27, 3 * 2 * 2 * (2 * (75 + 36) + 108))


def test_workloads_are_written_as_they_are_read():
    workload = workloads.workload("resnet18-32:batch=8:width=32", steps=5)
    sizes = workload.batch, workload.side, workload.steps, workload.width
    assert workload.network == "resnet18-32" and sizes == (8, 32, 5, 32)
    assert workloads.workload("wrn-28-10-32", "cuda").batch == 128
    for text in ("vgg", "resnet18-32:depth=3", "resnet18-32:batch=x"):
        with pytest.raises(ValueError, match=text.split(":")[-1]):
            workloads.workload(text)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [  # in millions, as published
        (lambda: networks.cifar_resnet18(10), 11.17),
        (lambda: networks.preact_resnet18(10), 11.17),
        (lambda: networks.wide_resnet(28, 10, 10), 36.48),
    ],
)
def test_networks_have_the_published_size(model, parameters):
    with torch.device("meta"):
        network = model()
        assert network.eval()(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.006)


def test_the_attack_command(tmp_path, monkeypatch, capsys, tiny_attack):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    file = tmp_path / "attack-cpu.json"
    names = "published,torchattacks,autocast,eager,plan-float32,plan-bf16,plan-fp16"
    arguments = ["--device", "cpu", "--workloads", TINY, "--peers", names, "--rounds", "2", "--steps", "2"]
    assert attack.main([*arguments, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["workloads"]
    status = {name: outcome["status"] for name, outcome in row["peers"].items()}
    assert status.pop("torchattacks") == status.pop("plan-fp16") == "unavailable"
    assert set(status.values()) == {"ok"}
    assert row["peers"]["eager"]["agreement"] == 1
    assert "GFLOP/s" in capsys.readouterr().out

    monkeypatch.setattr(report, "RESULTS", tmp_path / "nothing here")
    assert report.attack() == "Not measured yet."
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert (
        f"| ms per step | {TINY}, batch 4 |" in report.attack() and "| torchattacks | unavailable |" in report.attack()
    )
    assert "| published | " in report.attack_details() and "1 MB" in report.attack_details()


def test_a_peer_with_its_own_start_is_compared_from_there(monkeypatch, tiny_attack):
    class Theirs:
        def __init__(self, model, eps, alpha, steps, random_start):
            self.attack = PGD(model, eps, alpha, steps, random_start=random_start)

        def __call__(self, images, labels):
            return self.attack(images, labels)

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Theirs))
    row = harness.measure(attack.BENCHMARK, workloads.workload(TINY, steps=2), "cpu", ["torchattacks"], 1)
    assert row["peers"]["torchattacks"]["status"] == "ok" and row["peers"]["torchattacks"]["agreement"] == 1


def test_memory_of_a_peer(monkeypatch, capsys):
    def run(command, **options):  # here, because a process of its own takes seconds to start
        code = attack.main(command[3:])
        return SimpleNamespace(returncode=code, stdout=capsys.readouterr().out, stderr="")

    monkeypatch.setattr(attack.subprocess, "run", run)
    workload = workloads.workload("resnet18-32:batch=64:width=8", steps=1)
    (used,) = attack.child_memory("attack", "published", [workload], "cpu")
    activations = 64 * 8 * 32 * 32 * 4
    assert 5 * activations < used["peak"] < 100 * activations and used["first"] > 5 * activations
    monkeypatch.setattr(attack.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=1, stderr="a\nb"))
    with pytest.raises(RuntimeError, match="memory: b"):
        attack.child_memory("attack", "published", [workload], "cpu")


@pytest.mark.slow
def test_scaling(tmp_path, monkeypatch, tiny_attack):
    axes = {
        "batch": ("steps=1:width=4:side=8", (1, 2)),
        "steps": ("batch=2:width=4:side=8", (2,)),
        "side": ("batch=2:steps=1:width=4", (16,)),
        "width": ("batch=2:steps=1:side=8", (8,)),
    }
    monkeypatch.setattr(attack, "AXES", axes)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    file = tmp_path / "attack_scaling-cpu.json"
    assert attack.main(["--device", "cpu", "--scaling", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["workloads"]
    assert [(row["axis"], row["value"]) for row in rows] == [(a, v) for a, (_, values) in axes.items() for v in values]
    assert all(of["status"] == "ok" for row in rows for of in row["peers"].values())
    assert "| batch 2 | " in report.attack_scaling()
    report.draw_scaling(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_few_steps(tmp_path, monkeypatch, tiny_attack):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(attack, "FEW_BATCHES", (1, 3))
    monkeypatch.setattr(attack, "FEW_STEPS", (2,))
    file = tmp_path / "attack_few-cpu.json"
    arguments = ["--device", "cpu", "--few", "--workloads", TINY, "--rounds", "1", "--json", str(file)]
    assert attack.main(arguments) == 0
    rows = json.loads(file.read_text())["workloads"]
    assert [(row["batch"], row["steps"]) for row in rows] == [(1, 2), (3, 2)]
    for row in rows:
        assert all(outcome["status"] == "ok" for outcome in row["peers"].values())
        assert row["auto"] == {"float32": "plan", "bf16": "plan"}
    rows[0]["auto"]["bf16"] = "eager"
    rows[0]["peers"]["eager-bf16"]["times"]["attack"]["median"] = 3.0
    rows[0]["peers"]["plan-bf16"]["times"]["attack"]["median"] = 2.0
    file.write_text(json.dumps(json.loads(file.read_text()) | {"workloads": rows}))
    assert "3000.0 ms | 2000.0 ms | eager, 50 % slower |" in report.attack_few()


@pytest.mark.slow
def test_training_step(tmp_path, monkeypatch, tiny_attack):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    # PyTorch 2.15's float32 weight gradients of 4 channels in channels-last memory write past their end (oneDNN).
    small = "resnet18-32:batch=8:width=8:side=16"
    arguments = ["--device", "cpu", "--training", "--workloads", small]
    file = tmp_path / "attack_training-cpu.json"
    assert attack.main([*arguments, "--rounds", "1", "--steps", "2", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["workloads"]
    assert [outcome["status"] for outcome in row["peers"].values()] == ["ok"] * 3
    assert "| twins-fast-bf16 | " in report.attack_training()

    def wrong(workload, inputs):
        step = peers.our_training(workload, inputs, None)
        step.optimizer.param_groups[0]["lr"] = 1.0
        return step

    peer = harness.Peer(lambda a, g: peers._training_runner(a, g, wrong, torch.channels_last), ("cpu",))
    monkeypatch.setitem(harness.PEERS["attack_training"], "mine", peer)
    row = harness.measure(attack.STEP_BENCHMARK, workloads.workload(small, steps=2), "cpu", ["mine"], 1)
    assert row["peers"]["mine"]["status"] == "wrong"


@pytest.mark.slow
def test_precision(tmp_path, monkeypatch, tiny_attack):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    arguments = ["--device", "cpu", "--precision", "--images", "40", "--steps", "2", "--peers", "eager,plan-bf16"]
    assert attack.main([*arguments, "--json", str(tmp_path / "attack_precision-cpu.json")]) == 0
    assert "| 40 real images | " in report.attack_precision()
    eager, half = json.loads((tmp_path / "attack_precision-cpu.json").read_text())["workloads"]
    assert eager["agreement"] == 1 and 0.8 < half["agreement"] < 1
    assert 0.1 < eager["robust"] < 0.8 and abs(eager["loss"] - half["loss"]) < 0.05


def test_layers(tmp_path, monkeypatch, tiny_attack):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    file = tmp_path / "attack_layers-cpu.json"
    assert attack.main(["--device", "cpu", "--layers", TINY, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["workloads"]
    (layer,) = row["layers"]
    limits = 1000 / row["limits"]["bandwidth"], 100 / row["limits"]["peak"]["operations"]
    assert layer["floor_ms"] == pytest.approx(1e3 * max(limits))
    assert "| conv1 | conv | native | 1.000 ms | 2.000 ms |" in report.attack_layers()


def test_a_part_of_the_attack_does_not_replace_the_whole(monkeypatch):
    folders = []
    monkeypatch.setattr(attack, "Record", lambda *args: folders.append(args[4]) or SimpleNamespace(
        device="cpu", conclude=lambda problems: 0))  # fmt: skip
    for name in ("compare", "scaling", "few", "precision", "layers"):
        monkeypatch.setattr(attack, name, lambda *args: [])
    whole = [[], ["--training"], ["--scaling"], ["--few"], ["--precision"], ["--layers", "resnet18-32"]]
    part = [
        ["--peers", "eager"],
        ["--rounds", "1"],
        ["--steps", "3"],
        ["--layers", TINY],
        ["--workloads", "resnet18-32"],
    ]
    for arguments in (*whole, *part):
        assert attack.main(["--device", "cpu", *arguments]) == 0
    assert folders == [harness.RESULTS] * len(whole) + [harness.PARTIAL] * len(part)


TINY_ROWS = "eager,autocast,accelerate-float32,accelerate-bf16"


@pytest.fixture
def tiny_libraries(monkeypatch, tmp_path):
    """A tiny network, one iteration against two, and no AutoAttack, which takes 5000 steps whatever the network."""

    class Standard:
        def __init__(self, model, eps, **options):
            self.attack = PGD(model, eps, eps / 2, 2, engine="eager")
            self.fab = self.apgd_targeted = SimpleNamespace(n_target_classes=9)

        def run_standard_evaluation(self, images, labels, batch_size):
            return self.attack(images, labels), None

    monkeypatch.setattr(libraries, "AutoAttack", Standard)
    monkeypatch.setattr(libraries, "AUTO_BATCHES", {TINY: 4})
    monkeypatch.setattr(libraries, "NETWORKS", {TINY: (1, 2)})
    images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 5
    monkeypatch.setattr(libraries, "embedded_images", lambda device: [(images, labels), (images, labels)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_libraries(tiny_libraries, monkeypatch):
    file = tiny_libraries / "libraries-cpu.json"
    # An image on the border of two classes, which half precision may see on either side, is a quarter of these four.
    monkeypatch.setitem(libraries.TOLERANCE, torch.bfloat16, (libraries.TOLERANCE[torch.bfloat16][0], 0.25))
    arguments = ["--device", "cpu", "--batch", "4", "--rounds", "2", "--json", str(file)]
    assert libraries.main(arguments) == 0
    lines = json.loads(file.read_text())["workloads"]
    assert [line["attack"] for line in lines] == [libraries.STEP, *libraries.ATTACKS]
    for line in lines:
        assert list(line["peers"]) == TINY_ROWS.split(",")
        for outcome in line["peers"].values():
            few, many = (min(outcome["samples"][part]) for part in ("few", "many"))
            assert outcome["status"] == "ok" and outcome["seconds"] == pytest.approx(many - few)
    text = report.libraries()
    assert f"| {TINY}, batch 4 | {' | '.join(TINY_ROWS.split(','))} |" in text and "| FAB-T | " in text


def test_an_attack_that_finds_something_else_is_not_timed(tiny_libraries, monkeypatch, capsys):
    def lazy(model, problem, iterations):
        own = libraries.own_pgd("eager")(model, problem, iterations)
        return problem.images if isinstance(model, libraries.Autocast) else own

    def failing(model, problem, iterations):
        raise RuntimeError("no")

    monkeypatch.setattr(libraries, "ATTACKS", {"lazy": lazy, "failing": failing})
    monkeypatch.setattr(libraries, "TOLERANCE", {None: (1e-3, 0.1), torch.bfloat16: (1e-3, 0.1)})
    file = tiny_libraries / "libraries-cpu.json"
    rows = ["--rows", "eager,autocast", "--rounds", "1", "--batch", "4"]
    assert libraries.main(["--device", "cpu", *rows, "--json", str(file)]) == 1
    _, lazy_line, failing_line = json.loads(file.read_text())["workloads"]
    assert lazy_line["peers"]["eager"]["status"] == "ok"
    assert lazy_line["peers"]["autocast"]["status"] == "wrong" and "seconds" not in lazy_line["peers"]["autocast"]
    assert failing_line["peers"]["eager"] == {"status": "error", "reason": "RuntimeError: no"}
    assert "lazy: " in capsys.readouterr().err and "| error | error |" in report.libraries()


@pytest.mark.slow
def test_autoattack_a_batch_at_a_time(tiny_libraries, monkeypatch):
    file = tiny_libraries / "libraries_autoattack-cpu.json"

    def measured(images, *more):
        arguments = ["--device", "cpu", "--autoattack", "--images", str(images), "--json", str(file), *more]
        assert libraries.main(arguments) == 0
        return json.loads(file.read_text())["workloads"]

    first, second = measured(6)
    assert (first["images"], second["images"]) == (4, 2)
    for outcome in first["peers"].values():
        assert outcome["seconds"] > 0 and 0 <= outcome["robust"] <= 4
    whole = first["peers"]["accelerate-bf16"]["seconds"] + second["peers"]["accelerate-bf16"]["seconds"]
    assert f"{TINY}: accelerate-bf16 | 6 | {whole:.0f} s" in report.libraries_autoattack()
    resumed = measured(11, "--resume")
    assert resumed[0] == first and [line["images"] for line in resumed] == [4, 4, 3]
    assert measured(3, "--resume") == resumed  # nothing is lost
    monkeypatch.setattr(libraries, "EPOCHS", libraries.EPOCHS + 1)
    (other,) = measured(3, "--resume")
    assert other["images"] == 3


TINY_LOOPS = ["--device", "cpu", "--workload", "resnet18-32:batch=4:side=8:width=4:steps=2", "--rounds", "1"]


@pytest.mark.slow
def test_loops_of_others_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(drop_in.TOLERANCE, torch.bfloat16, 1.0)
    file = tmp_path / "drop_in-cpu.json"
    evaluation = "fast_adversarial (evaluation)"
    assert drop_in.main([*TINY_LOOPS, "--only", evaluation, "--json", str(file)]) == 0
    assert drop_in.main([*TINY_LOOPS, "--only", f"{evaluation},MAIR", "--json", str(file), "--resume"]) == 0
    rows = json.loads(file.read_text())["workloads"]
    assert [row["name"] for row in rows] == [evaluation, "MAIR"]
    for row in rows:
        assert row["lines"] == 1 and list(row["peers"]) == list(drop_in.WAYS)
        assert all(outcome["seconds"] > 0 and len(outcome["losses"]) == 2 for outcome in row["peers"].values())
    after = [row["peers"]["ours, float32"]["losses"][1] for row in rows]
    assert after[0] != after[1]  # the first one, an evaluation, takes no step
    text = report.drop_in()
    assert "| MAIR | eval mode | 1 |" in text and " ms, " in text


def test_a_loop_that_trains_on_something_else_is_not_timed(tmp_path, monkeypatch, capsys):
    def clean(s, **how):
        return lambda: drop_in.trained_on(s, lambda: s.images)

    def failing(s):
        raise ValueError("no such loop")

    right = drop_in.CASES["MAIR"]
    cases = {"clean": replace(right, ours=clean), "failing": replace(right, ours=failing)}
    monkeypatch.setattr(drop_in, "CASES", cases)
    file = tmp_path / "drop_in-cpu.json"
    assert drop_in.main([*TINY_LOOPS, "--json", str(file)]) == 1
    rows = {row["name"]: row["peers"]["ours, float32"] for row in json.loads(file.read_text())["workloads"]}
    assert rows["clean"]["status"] == "wrong" and "seconds" not in rows["clean"]
    assert rows["failing"] == {"status": "error", "reason": "ValueError: no such loop"}
    assert "clean: ours, float32 wrong" in capsys.readouterr().err


def test_a_part_of_the_libraries_does_not_replace_the_whole(monkeypatch):
    folders = []
    monkeypatch.setattr(libraries, "Record", lambda *args: folders.append(args[4]) or SimpleNamespace(
        device="cpu", conclude=lambda problems: 0))  # fmt: skip
    for name in ("iterations", "autoattack"):
        monkeypatch.setattr(libraries, name, lambda *args: [])
    whole = [[], ["--autoattack"]]
    part = [["--rows", "eager"], ["--networks", "embedded"], ["--images", "5"], ["--batch", "4"], ["--rounds", "1"]]
    for arguments in (*whole, *part):
        assert libraries.main(["--device", "cpu", *arguments]) == 0
    assert folders == [harness.RESULTS] * len(whole) + [harness.PARTIAL] * len(part)


def test_what_a_library_does_not_need_has_a_stand_in_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text("import absent.part\nfrom absent import Base\nclass Own(Base): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        third_party.library("picky")
    monkeypatch.setitem(third_party.ABSENT, "picky", ("absent",))
    monkeypatch.delitem(sys.modules, "picky", raising=False)
    assert third_party.library("picky").Own(1, two=2)
    assert not [name for name in sys.modules if name.startswith("absent")]


class Convolutional(torch.nn.Sequential):
    def __init__(self, width):
        body = [torch.nn.Conv2d(3, width, 3), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        super().__init__(*body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10))


class Random(Convolutional):
    def forward(self, x):
        return super().forward(x + torch.rand(1))


class Broken(Convolutional):
    def forward(self, x):
        raise TypeError("no images")


class Sorted(Convolutional):
    def forward(self, x):
        return super().forward(x).sort(1).values


NETWORKS = {"small": Convolutional, "large": Convolutional, "random": Random, "broken": Broken, "sorted": Sorted}


@pytest.fixture
def tiny_zoo(monkeypatch, tmp_path):
    """A zoo of few layers, and no processes of their own: these networks do not die."""

    def build(name):
        if name == "absent":
            raise ValueError("no such network")
        return NETWORKS[name](8 if name == "large" else 4), 16

    def here(function, tasks, limits, workers=1):
        for task in tasks:
            yield task, children.Ended("killed") if task[1:2] == ("large",) else function(*task)

    tiny = zoos.Zoo(lambda: [*NETWORKS, "absent"], build)
    monkeypatch.setattr(zoos, "ZOOS", {"tiny": tiny})
    monkeypatch.setattr(coverage, "ZOOS", zoos.ZOOS)
    monkeypatch.setattr(report, "ZOOS", zoos.ZOOS)
    monkeypatch.setattr(coverage, "version", lambda zoo: "1.0")
    monkeypatch.setattr(zoos, "version", lambda zoo: "1.0")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for module in (children, coverage):
        monkeypatch.setattr(module, "in_children", here)
    for module in (coverage, zoos):
        monkeypatch.setattr(module, "PARTIAL", tmp_path)
    monkeypatch.setattr(coverage, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    return tmp_path / "results" / "coverage-tiny-cpu.json"


def test_coverage(tiny_zoo, monkeypatch, capsys):
    assert coverage.main(["--zoo", "tiny"]) == 0
    rows = {row["name"]: row for row in json.loads(tiny_zoo.read_text())["workloads"]}
    status = {name: row["status"] for name, row in rows.items()}
    expected = {"small": "planned", "large": "ended", "random": "refused", "broken": "broken", "sorted": "planned"}
    assert status == expected | {"absent": "broken"}
    small = rows["small"]
    assert small["kind"] == "BatchNorm" and small["segments"] == 0 and small["error"] < 1e-4 and small["pixels"] < 1e-3
    assert rows["sorted"]["operations"]["sort"] == 1 and "draws random numbers" in rows["random"]["reason"]
    assert "; its own gradient in float32 is off by" in rows["random"]["reason"]
    assert rows["broken"]["reason"] == "TypeError: no images" and rows["large"]["reason"] == "killed"
    assert "| tiny | BatchNorm | 3 | 3 | 2 | 1 | 0 | 1 | 0 | 0 |" in report.coverage()
    assert "| tiny | not known | 3 | 3 | 0 | 0 | 0 | 0 | 2 | 1 |" in report.coverage()
    assert "| TypeError: no images | 1 | broken |" in report.coverage_reasons()
    assert "| sort | 1 | sorted |" in report.coverage_segments() and "| random | " in report.coverage_refused()
    assert report.coverage_time() == "Not measured yet."

    monkeypatch.setattr(coverage, "planned_gradient", lambda program, problem: 1.1 * coverage.gradient_of(problem))
    assert coverage.main(["--zoo", "tiny", "--resume"]) == 0  # measured before; what was not ready is tried again
    assert coverage.main(["--zoo", "tiny", "--only", "^small$"]) == 1  # into another file
    assert "small: the gradient is off by 0.1, 0.0001 allowed" in capsys.readouterr().err
    assert {row["name"]: row for row in json.loads(tiny_zoo.read_text())["workloads"]} == rows


def earlier(file):
    """The record of an earlier run on the tiny zoo, and the one row that it has measured."""
    record = harness.Record("coverage-tiny", "cpu", "", {"small": False, "version": "1.0"}, file.parent)
    row = {"name": "small", "stands_for": 1, "commit": record.header["commit"], "status": "broken", "reason": "kept"}
    return record, row


def test_coverage_takes_up_what_an_unfinished_run_has_measured(tiny_zoo, monkeypatch):
    record, row = earlier(tiny_zoo)
    record.add(row)
    assert not tiny_zoo.exists()
    assert coverage.main(["--zoo", "tiny"]) == 0
    assert json.loads(tiny_zoo.read_text())["workloads"][0]["reason"] == "kept"
    row["commit"] = "another"
    record.add(row)
    assert coverage.main(["--zoo", "tiny"]) == 0
    assert "reason" not in json.loads(tiny_zoo.read_text())["workloads"][0]


def test_coverage_of_another_machine_is_kept(tiny_zoo, monkeypatch):
    record, row = earlier(tiny_zoo)
    here, record.header = record.machine, record.header | {"machine": "another"}
    measured = {"kind": "BatchNorm", "segments": 0, "status": "planned", "side": 16, "times": "killed", "memory": {}}
    record.add({key: value for key, value in row.items() if key != "reason"} | measured)
    monkeypatch.setattr(coverage, "alone", lambda limits, function, *arguments: 5)
    assert coverage.main(["--zoo", "tiny", "--resume", "--first", "2"]) == 0
    kept, new = json.loads(tiny_zoo.read_text())["workloads"]
    assert kept == record.rows[0] | {"machine": "another"} and (new["name"], new["machine"]) == ("large", here)
    assert f"Rows: 1 on another, commit {row['commit']}; 1 on {here}, commit" in report.coverage()
    assert "On another:" in report.coverage_time() and here not in report.coverage_time()

    assert coverage.main(["--zoo", "tiny", "--resume", "--first", "1", "--memory"]) == 0  # one row is of one machine
    anew = json.loads(tiny_zoo.read_text())["workloads"][-1]
    assert anew["machine"] == here and set(anew["memory"].values()) == {5} and "times" not in anew

    record.header |= {"machine": here}
    for missing in ({"memory"}, set()):  # and of one commit, unless it lacks nothing
        old = row | {"commit": "earlier"} | {key: measured[key] for key in measured.keys() - missing}
        record.rows = []
        record.add({key: value for key, value in old.items() if key != "reason"})
        assert coverage.main(["--zoo", "tiny", "--resume", "--first", "1", "--memory"]) == 0
        (found,) = json.loads(tiny_zoo.read_text())["workloads"]
        assert found["commit"] == (row["commit"] if missing else "earlier")

    record.rows = []
    record.add(row | {"commit": "another", "status": "refused"})
    assert coverage.main(["--zoo", "tiny", "--resume", "--first", "1"]) == 0  # which this commit may plan
    assert json.loads(tiny_zoo.read_text())["workloads"][-1]["status"] == "planned"


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False])
def test_coverage_of_families_with_times_and_memory(half, tiny_zoo, monkeypatch):
    monkeypatch.setattr(coverage, "has_instructions", lambda dtype: half or dtype == torch.float32)
    arguments = ["--zoo", "tiny", "--families", "--only", "small|large", "--json", str(tiny_zoo)]
    assert coverage.main([*arguments, "--time"]) == coverage.main([*arguments, "--time", "--memory"]) == 0
    (row,) = json.loads(tiny_zoo.read_text())["workloads"]
    ways, compared = set(row["times"]["milliseconds"]), set(row["memory"])
    assert ways == (set(coverage.WAYS) if half else {"eager", "plan-float32"})
    assert compared == ({"autocast", "plan-bf16"} if half else ways)
    assert (row["name"], row["stands_for"]) == ("small", 2) and not row["times"]["failures"]
    assert "| small | BatchNorm | 0 | " in report.coverage_time() and "failed" not in report.coverage_time()
    assert "| BatchNorm | 1 | " in report.coverage_speed() and "| others |" not in report.coverage_speed()


def test_speedups_and_memory_in_coverage():
    slow = {"eager": 10.0, "autocast": 5.0, "plan-float32": 8.0, "plan-bf16": 10.0}
    fast = {"eager": 10.0, "plan-float32": 5.0, "plan-bf16": 2.0}
    network = {"kind": "BatchNorm", "segments": 0}
    rows = [
        network | {"name": "fast", "times": {"milliseconds": fast, "failures": {"autocast": "killed"}}},
        network | {"name": "slow", "times": {"milliseconds": slow, "failures": {}}},
        network | {"name": "ended", "times": "killed", "memory": {"autocast": "killed"}},
    ]
    rows[0]["memory"] = {"autocast": 40_000_000, "plan-bf16": 10_000_000}
    times = {"milliseconds": {"eager": 3.0, "plan-float32": 1.5}, "failures": {}}
    memory = {"eager": 8_000_000, "plan-float32": 4_000_000}
    float32 = network | {"name": "float32", "times": times, "memory": memory}
    gains = [{"float32": 2, "bf16": 5}, {"float32": 1.25, "bf16": 0.5}, {}, {"float32": 2}]
    assert [coverage.speedups(row) for row in [*rows, float32]] == gains
    assert coverage.time_summary(rows)[1] == ["BatchNorm", "2", "1.25, 1.62", "0.50, 2.75", "1", "0.25, 0.25"]
    _, ended, slowest, fastest = coverage.time_table(rows)
    assert [line[0] for line in (ended, slowest, fastest)] == ["ended", "slow", "fast"]
    assert ended[3:] == ["failed"] * 4 + [""] * 2 + ["failed", ""] and fastest[7:] == ["2.00 x", "5.00 x", "40", "10"]
    assert coverage.time_summary([float32])[1] == ["BatchNorm", "1", "2.00, 2.00", "0", "0.50, 0.50"]
    head, line = coverage.time_table([float32])
    assert dict(zip(head, line, strict=True)) == {
        "batch 8": "float32", "kind": "BatchNorm", "segments": "0", "eager": "3 ms", "plan-float32": "2 ms",
        "float32": "2.00 x", "MB, eager": "8", "MB, plan-float32": "4",
    }  # fmt: skip


def test_a_process_that_dies_is_a_result():
    tasks = [(signal.raise_signal, signal.SIGKILL), (time.sleep, 60), (bytearray, 1 << 30), (int, "x"), (int, "3")]
    limits = children.Limits(seconds=1, gigabytes=0.1)
    results = dict(children.in_children(lambda function, *arguments: function(*arguments), tasks, limits, workers=2))
    said = [str(results[task]) for task in tasks]
    assert said[:3] == ["killed by SIGKILL", "not ready after 1 s", "MemoryError: no message"]
    assert said[3].startswith("ValueError: invalid literal") and results[int, "3"] == 3
    with pytest.raises(children.Ended, match="exit status 3"):
        children.alone(limits, os._exit, 3)


def test_an_enlivened_network_has_no_constant_parameters():
    model = Convolutional(4)
    model.append(torch.nn.LayerNorm(10))
    torch.nn.init.zeros_(model[5].weight)
    zoos.enliven(model, torch.rand(4, 3, 16, 16))
    assert not any(parameter.min() == parameter.max() for parameter in model.parameters())
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1
    y = torch.nn.functional.batch_norm(model[0](torch.rand(4, 3, 16, 16)), model[1].running_mean, model[1].running_var)
    assert abs(y.std() - 1) < 0.1


def test_dynamics_are_added_up(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "small", partial(CifarResNet, width=4, blocks=(1, 1)))
    row = dynamics.measure("small", 4, 8, "none", 2, tmp_path)
    times = {name: spread["median"] for name, spread in row["times"].items()}
    assert {name: spread["samples"] for name, spread in row["times"].items()} == dict.fromkeys(times, 2)
    added = times["gradients"] + times["gradients looked at"] + times["measurement"] / row["every"]
    assert row["share"] == added / times["step"] > 0
    assert f"| small, batch 4 | {1e3 * times['step']:.0f} ms |" in dynamics.table({"small": row})


def test_dynamics_need_a_round(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.dynamics", "--rounds", "0"])
    with pytest.raises(SystemExit):
        dynamics.main()
    assert "needs at least one round" in capsys.readouterr().err
