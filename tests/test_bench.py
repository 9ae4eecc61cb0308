"""The benchmark harness: nothing wrong is timed, nothing is dropped, bytes are counted right."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torchvision.models import resnet50

from bench import harness, header, report, twin_bn
from bench.twin_bn import Layer

SMALL = Layer("small", 2, (4, 3, 2, 2), 2, True, True)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Two sets of operands are enough, and few values are checked at a time."""
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 1)
    monkeypatch.setattr(twin_bn, "CHECKED_AT_ONCE", 32)


def measured(monkeypatch, function, layer=SMALL, **kwargs):
    """The row of a peer that computes ``function``, beside the published one."""

    def build(layer, given):
        return twin_bn.runner(layer, given, function)

    monkeypatch.setitem(harness.PEERS["twin_bn"], "mine", harness.Peer(build, ("cpu",)))
    return harness.measure(twin_bn.BENCHMARK, layer, "cpu", ["published", "mine"], 1, **kwargs)


def wings_swapped(x, residual, split, frozen, adaptive, relu):
    return twin_bn.as_published(x, residual, split, adaptive, frozen, relu)


def one_value_off(x, residual, split, frozen, adaptive, relu):
    y = twin_bn.as_published(x, residual, split, frozen, adaptive, relu)
    return y + 0.1 * (torch.arange(y.numel()).view(y.shape) == y.numel() - 1)


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
    def build(layer, given):
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
    found = twin_bn.layers(resolution, 32)
    assert sum(layer.count for layer in found) == 53
    assert len({layer.name for layer in found}) == len(found)
    assert (32, *largest) in {layer.shape for layer in found}
    kinds = {kind: sum(f.count for f in found if (f.add, f.relu) == kind) for kind in {(f.add, f.relu) for f in found}}
    assert kinds == {(False, True): 33, (True, True): 16, (False, False): 4}  # 16 blocks, 4 with a downsample branch
    assert all(layer.split == 16 for layer in found)
    norms = [m for m in resnet50().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sorted(m.num_features for m in norms) == sorted(f.shape[1] for f in found for _ in range(f.count))


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
    kept = json.loads((tmp_path / "twin_bn-cpu.json").read_text())
    assert kept["command"] == " ".join(["python -m bench.twin_bn", *arguments])
    assert set(kept["header"]) == set(header.header())
    (row,) = kept["workloads"]
    times = row["peers"]["eager-amp"]["times"]
    assert set(times) == {"forward", "backward", "both"}
    for stage, t in times.items():
        assert t["q1"] <= t["median"] <= t["q3"] and t["samples"] == 2 * row["peers"]["eager-amp"]["sets"]
        assert t["bandwidth"] * t["median"] == pytest.approx(row["floor_bytes"][stage])
        assert t["times_floor"] * t["bandwidth"] == pytest.approx(row["copy"]["bandwidth"])
    assert row["peers"]["cpp"]["status"] in ("ok", "unavailable")  # the latter without a compiler
    assert json.loads(json.dumps(kept)) == kept

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

    found = twin_bn.totals([row(2.0), row(4.0)])
    assert found["a"] == {"seconds": {"both": 18.0}, "times_floor": {"both": 3.0}, "kept": 30}
    assert found["b"] == {"failed": "wrong on 2 of 2 layers"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_gpu_check_parses():
    script = header.ROOT / "bench" / "gpu_check.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        twin_bn.main(["--device", "cuda"])
    assert "no CUDA device here" in capsys.readouterr().err


def test_sanitize_passes_and_fails(monkeypatch, capsys):
    from bench import sanitize

    monkeypatch.setattr(sanitize, "SHAPES", [(2, 3, 3, 1)])
    monkeypatch.setattr(sanitize, "DTYPES", ["float32"])
    monkeypatch.setattr(sanitize, "backend", type("", (), {"use_backend": lambda name: harness.nullcontext()}))
    monkeypatch.setattr(sys, "argv", ["sanitize", "--backend", "cpp"])
    assert sanitize.main() == 0 and ": 0 wrong" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "twins_fast", lambda *args: twin_bn.twins_fast(*args) * 1.01)
    assert sanitize.main() == 1 and "y is off by" in capsys.readouterr().out
