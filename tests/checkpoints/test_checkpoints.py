from __future__ import annotations

import builtins
import functools
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from twins_fast.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    load_checkpoint,
    load_pretrained,
    load_state,
    read_state_dict,
    save_checkpoint,
    write_atomically,
)

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class TwoWing(nn.BatchNorm2d):
    """Entries of a two-wing layer."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.main_bn = nn.BatchNorm2d(channels)


class Body(nn.Module):
    """A few layers named as in a ResNet."""

    def __init__(self, bn=nn.BatchNorm2d, classes: int = 5, downstream: int | None = 3, own_statistics: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = bn(4)
        block = nn.Module()
        block.conv1 = nn.Conv2d(4, 8, 1, bias=False)
        block.bn1 = bn(8)
        block.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), bn(8))
        self.layer1 = nn.Sequential(block)
        self.fc = nn.Linear(8, classes)
        if downstream:
            self.fc_downstream = nn.Linear(8, downstream)
        if own_statistics:
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
        for value in self.state_dict().values():
            value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.randint(9, value.shape))


BN_LAYERS = ("bn1", "layer1.0.bn1", "layer1.0.downsample.1")
BN_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_names(wing: str = "") -> list[str]:
    return [f"{layer}.{wing}{leaf}" for layer in BN_LAYERS for leaf in BN_LEAVES]


def robustness_checkpoint(state: dict, key: str = "model") -> dict:
    """Laid out as the robustness library's trainer does."""
    network = OrderedDict()
    network["module.normalizer.new_mean"] = torch.rand(3, 1, 1)
    network["module.normalizer.new_std"] = torch.rand(3, 1, 1)
    network.update({f"module.model.{name}": value for name, value in state.items()})
    network["module.attacker.normalize.new_mean"] = torch.rand(3, 1, 1)
    network["module.attacker.normalize.new_std"] = torch.rand(3, 1, 1)
    network.update({f"module.attacker.model.{name}": value for name, value in state.items()})
    scalars = [np.float64(0.1), np.float32(0.5), np.int64(7), np.bool_(True)]
    return {
        key: network,
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(4)}}, "param_groups": [{"lr": scalars[0]}]},
        "schedule": {"base_lrs": scalars, "last_epoch": np.int32(3)},
        "epoch": 90,
        "nat_prec1": torch.tensor(63.9),
    }


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
        assert state[name].device.type == "cpu" and not state[name].requires_grad


def torch_bytes(content, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.fixture
def save(tmp_path):
    def write(content, zipped: bool = True, name: str = "net.ckpt"):
        path = tmp_path / name
        path.write_bytes(torch_bytes(content, zipped))
        return path

    return write


# reading


@FORMATS
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_reads_the_robustness_library(save, zipped, key):
    state = Body(downstream=None).state_dict()
    assert_same(read_state_dict(save(robustness_checkpoint(state, key), zipped)), state)


def test_reads_scalars_of_either_numpy(tmp_path):
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    data = torch_bytes(robustness_checkpoint(Body().state_dict()), zipped=False)
    assert old in data or new in data
    for spelling in (old, new):
        path = tmp_path / "net.ckpt"
        path.write_bytes(data.replace(old, spelling).replace(new, spelling))
        assert "conv1.weight" in read_state_dict(path)


@FORMATS
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "attacker.model.", "_orig_mod.module."])
def test_reads_a_bare_two_wing_state_dict(save, zipped, prefix):
    state = Body(TwoWing, own_statistics=True).state_dict()
    assert_same(read_state_dict(save({prefix + k: v for k, v in state.items()}, zipped)), state)


def test_reads_parameters_and_a_real_network(save):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet50(width_per_group=8)
    path = save({"state_dict": {f"module.{k}": v for k, v in net.state_dict(keep_vars=True).items()}})
    read = read_state_dict(path)
    assert_same(read, net.state_dict())
    for parameter in net.parameters():
        parameter.data.zero_()
    load_state(net, read)
    assert_same(net.state_dict(), read)


def test_reads_safetensors_whatever_its_name(tmp_path):
    state = Body().state_dict()
    for name in ("a.safetensors", "a.bin"):
        safetensors.torch.save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / name)
        assert_same(read_state_dict(tmp_path / name), state)


def test_reads_the_network_out_of_a_training_checkpoint(tmp_path):
    state = Body(TwoWing).state_dict()
    tensors = {f"model.{k}": v for k, v in state.items()} | {f"momentum.{k}": v for k, v in state.items()}
    save_checkpoint(tmp_path / "last.safetensors", tensors, {})
    assert_same(read_state_dict(tmp_path / "last.safetensors"), state)


def test_what_is_read_does_not_write_back(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {})
    read_state_dict(path)["a"].zero_()
    assert read_state_dict(path)["a"].eq(1).all()


def test_names_that_clash(save):
    with pytest.raises(CheckpointError, match="two entries are named a"):
        read_state_dict(save({"a": torch.ones(1), "module.a": torch.ones(1)}))


@pytest.mark.parametrize(
    "content, words",
    [
        ({"epoch": 3, "lr": 0.1}, "'epoch', 'lr'"),
        ({"model": {"best": 1}}, "'best'"),
        ({}, "none"),
        ({"module.normalizer.new_mean": torch.ones(3)}, "normalizer"),
        ([torch.ones(3)], "list"),
        (torch.ones(3), "Tensor"),
        ({"a": torch.ones(3).to_sparse()}, "a is not an ordinary dense tensor"),
        ({"a": torch.ones(3, device="meta")}, "a is not an ordinary dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_no_network_in_the_file(save, content, words):
    with pytest.raises(CheckpointError, match="net.ckpt") as caught:
        read_state_dict(save(content))
    assert words in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"P", b"PK\3\4", b"<html>not found</html>", bytes(64), b"\x80\x02", b"."])
def test_not_a_checkpoint(tmp_path, data, suffix):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"net{suffix}: .*(empty|not a readable)"):
        read_state_dict(path)


def test_other_archives(tmp_path):
    path = tmp_path / "net.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match="net.ckpt: not a readable"):
        read_state_dict(path)


def test_missing_file(tmp_path):
    for read in (read_state_dict, load_checkpoint):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path, kind):
    state = Body().state_dict()
    whole = safetensors.torch.save(state) if kind == "safetensors" else torch_bytes(state, kind == "zip")
    path = tmp_path / "net.ckpt"
    for size in {0, 1, 2, 3, 7, 8, 9, 10, 20, 60, 200, *(len(whole) * k // 9 for k in range(1, 9)), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="net.ckpt: "):
            read_state_dict(path)


# pickles that ask for more


class Calls:
    """Unpickles into ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(content, form: str) -> bytes:
    if form.startswith("bare"):
        return pickle.dumps(content, int(form[-1]))
    return torch_bytes(content, form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare0", "bare1", "bare2", "bare3", "bare4", "bare5"])
@pytest.mark.parametrize("place", ["top", "weights", "optimizer"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, monkeypatch, form, place):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not switch the check off
    marker, path = tmp_path / "ran", tmp_path / "net.ckpt"
    evil = Calls(os.system, f"touch {marker}")
    content = {"top": evil, "weights": {"conv1.weight": evil}, "optimizer": {"model": {}, "optimizer": evil}}[place]
    path.write_bytes(pickled(content, form))
    with pytest.raises(CheckpointError, match=rf"net.ckpt: refused, .*'{os.system.__module__}\.system'"):
        read_state_dict(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists(), "the test's pickle does run where it is not refused"


@pytest.mark.parametrize("form", ["zip", "legacy", "bare2", "bare4"])
@pytest.mark.parametrize(
    "evil, name",
    [
        (Calls(builtins.eval, "1"), "builtins.eval"),
        (Calls(builtins.getattr, "a", "b"), "builtins.getattr"),
        (functools.partial(print), "functools.partial"),
        (Calls(shutil.rmtree, "absent"), "shutil.rmtree"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.ones(3), "numpy._?core.(multiarray._reconstruct|numeric._frombuffer)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_anything_else_is_refused_by_name(tmp_path, evil, name, form):
    path = tmp_path / "net.ckpt"
    path.write_bytes(pickled({"model": {"a": 1}, "x": evil}, form))
    with pytest.raises(CheckpointError, match=f"net.ckpt: refused, .*'{name}'") as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)


def test_reading_leaves_the_callers_allow_list_alone(save):
    path = save(robustness_checkpoint(Body().state_dict()))
    scalar = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        read_state_dict(path)
        assert set(torch.serialization.get_safe_globals()) == before


# loading


def test_load_state_casts_and_copies():
    model, source = Body(), Body().state_dict()
    half = {k: v.half() if v.is_floating_point() else v.int() for k, v in source.items()}
    load_state(model, half)
    for name, value in model.state_dict().items():
        assert value.dtype == source[name].dtype and torch.equal(value, half[name].to(value.dtype))
        assert value.data_ptr() != half[name].data_ptr()


def test_load_state_lists_everything_and_changes_nothing():
    model = Body()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = Body().state_dict()
    del state["bn1.bias"], state["fc_downstream.weight"]
    state["stray.weight"] = torch.ones(1)
    state["conv1.weight"] = torch.ones(4, 3, 7, 7)
    state["bn1.num_batches_tracked"] = torch.tensor(1.0)
    state["layer1.0.bn1.weight"] = torch.ones(8, dtype=torch.int64)
    state["fc.bias"] = torch.full((5,), float("nan"))
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: bn1.bias",
        "  missing: fc_downstream.weight",
        "  extra: stray.weight",
        "  conv1.weight: shape [4, 3, 7, 7] in the checkpoint, [4, 3, 3, 3] in the model",
        "  bn1.num_batches_tracked: torch.float32 in the checkpoint, torch.int64 in the model",
        "  layer1.0.bn1.weight: torch.int64 in the checkpoint, torch.float32 in the model",
        "  fc.bias: NaN or infinite values (as torch.float32)",
    ]
    assert_same(model.state_dict(), before)


def test_load_state_refuses_what_overflows_in_the_models_dtype():
    with pytest.raises(CheckpointError, match="weight: NaN or infinite"):
        load_state(nn.Linear(1, 1, bias=False).half(), {"weight": torch.full((1, 1), 1e6)})


def test_load_state_allows_whole_modules_only():
    state = Body().state_dict()
    without_heads = {k: v for k, v in state.items() if not k.startswith("fc")}
    with pytest.raises(CheckpointError) as caught:
        load_state(Body(), without_heads, allow_missing=("fc",))
    assert str(caught.value).count("missing: fc_downstream.") == 2 and "fc.weight" not in str(caught.value)
    load_state(Body(), without_heads, allow_missing=("fc.", "fc_downstream.weight", "fc_downstream.bias"))
    load_state(Body(downstream=None), state, allow_extra=["fc_downstream"])


@pytest.mark.parametrize("bn", [nn.BatchNorm2d, TwoWing])
@pytest.mark.parametrize("head", [None, 3, 10])
def test_pretrained_body_and_fresh_head(bn, head):
    model, source = Body(bn), Body(downstream=head).state_dict()
    fresh = {k: v.clone() for k, v in model.fc_downstream.state_dict().items()}
    load_pretrained(model, source)
    loaded = model.state_dict()
    for name, value in source.items():
        if not name.startswith("fc_downstream"):
            assert torch.equal(loaded[name], value), name
    if bn is TwoWing:
        for plain, frozen in zip(bn_names(), bn_names("main_bn."), strict=True):
            assert torch.equal(loaded[frozen], source[plain]), frozen
            assert loaded[frozen].data_ptr() != loaded[plain].data_ptr()
    assert_same(model.fc_downstream.state_dict(), fresh)


def test_pretrained_two_wing_file():
    source = Body(TwoWing).state_dict()
    twin, plain = Body(TwoWing), Body()
    load_pretrained(twin, source)
    load_pretrained(plain, source)
    for name in bn_names() + bn_names("main_bn."):
        assert torch.equal(twin.state_dict()[name], source[name])
    for name in bn_names():
        assert torch.equal(plain.state_dict()[name], source[name])


def test_pretrained_wings_are_not_mixed():
    source = Body(TwoWing).state_dict()
    del source["bn1.main_bn.running_var"]
    with pytest.raises(CheckpointError, match=r"missing: bn1\.main_bn\.running_var"):
        load_pretrained(Body(TwoWing), source)


def test_pretrained_imagenet_head_and_input_statistics():
    without_fc = {k: v for k, v in Body().state_dict().items() if not k.startswith("fc.")}
    load_pretrained(Body(own_statistics=True), without_fc)
    headless = Body(own_statistics=True)
    del headless.fc
    load_pretrained(headless, Body(own_statistics=True).state_dict())
    with pytest.raises(CheckpointError, match=r"fc\.bias: shape \[7\] in the checkpoint, \[5\] in the model"):
        load_pretrained(Body(), Body(classes=7).state_dict())

    source = Body(own_statistics=True).state_dict()
    model = Body()
    with pytest.raises(CheckpointError, match="extra: mean\n  extra: std"):
        load_pretrained(model, source)
    model.register_buffer("mean", source["mean"].flatten().clone(), persistent=False)
    model.register_buffer("std", source["std"].clone(), persistent=False)
    load_pretrained(model, source)
    model.std.mul_(2)
    with pytest.raises(CheckpointError, match="model:\n  extra: std$"):
        load_pretrained(model, source)


def test_pretrained_from_a_robustness_file_into_the_package_layer(save):
    twin_nn = pytest.importorskip("twins_fast.nn")
    source = Body(downstream=None).state_dict()
    path = save(robustness_checkpoint(source))
    late = Body()
    load_pretrained(late, read_state_dict(path))
    late, early = twin_nn.convert_twin_bn(late), twin_nn.convert_twin_bn(Body())
    load_pretrained(early, read_state_dict(path))
    early.fc_downstream.load_state_dict(late.fc_downstream.state_dict())
    assert_same(early.state_dict(), late.state_dict())


# saving


def test_round_trip(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "view": base[3:9],
        "whole": base,
        "same": base,
        "transposed": base.view(4, 6).t(),
        "expanded": torch.ones(1).expand(5),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.rand(2)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.rand(3).bfloat16(),
        "mask": torch.tensor([True, False]),
    }
    meta = {"step": 3, "robust": 51.5, "classes": ["a", "ü"], "none": None}
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, tensors, meta)
    loaded, loaded_meta = load_checkpoint(path)
    assert loaded_meta == meta
    assert_same(loaded, {name: value.detach() for name, value in tensors.items()})
    assert all(value.is_contiguous() for value in loaded.values())
    assert json.loads((tmp_path / "last.json").read_text()) == meta
    assert sorted(os.listdir(tmp_path)) == ["last.json", "last.safetensors"]


def test_the_sidecar_is_not_needed(tmp_path):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})
    (tmp_path / "last.json").write_text("scribble")
    assert load_checkpoint(path)[1] == {"step": 1}
    with pytest.raises(ValueError, match="sidecar"):
        save_checkpoint(tmp_path / "last.json", {}, {})


def test_meta_that_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "last.safetensors", {"a": torch.ones(2)}, {"x": torch.ones(1)})
    assert not os.listdir(tmp_path)


def test_load_checkpoint_refuses_damage_and_strangers(tmp_path):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"a": torch.rand(50)}, {"step": 1})
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="last.safetensors"):
            load_checkpoint(path)
    for data in (torch_bytes({"a": torch.ones(2)}, True), safetensors.torch.save({"a": torch.ones(2)})):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="last.safetensors"):
            load_checkpoint(path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 0})

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})
    tensors, meta = load_checkpoint(path)
    assert meta == {"step": 0} and tensors["a"].eq(0).all()
    assert sorted(os.listdir(tmp_path)) == ["last.json", "last.safetensors"]


def test_data_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: (calls.append(name), real[name](*a))[1])
    write_atomically(tmp_path / "a.txt", b"text")
    assert calls == (["fsync", "replace", "fsync"] if os.name == "posix" else ["fsync", "replace"])
    assert (tmp_path / "a.txt").read_bytes() == b"text"


def test_old_leftovers_of_killed_saves_are_removed(tmp_path):
    old, young, other = (tmp_path / f".{name}.0a1b2c3d.tmp" for name in ("a[1].bin", "a[1].bin.x", "a1.bin"))
    for left in (old, young, other):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_atomically(tmp_path / "a[1].bin", b"whole")
    assert not old.exists() and young.exists() and other.exists()


KILLED_SAVERS = """
import os, signal, sys, time, torch
from twins_fast.checkpoints import load_checkpoint, save_checkpoint

def save(step):
    save_checkpoint(path, {"a": torch.full((50_000,), float(step))}, {"step": step})

torch.set_num_threads(1)
path = sys.argv[1]
save(0)
steps = []
for life in range(25):
    child = os.fork()  # cheaper than a new interpreter for each kill
    if child == 0:
        for step in range(1000 * life, 1000 * life + 1000):
            save(step)
    saved, deadline = load_checkpoint(path)[1]["step"], time.monotonic() + 30
    while load_checkpoint(path)[1]["step"] == saved and time.monotonic() < deadline:
        pass  # at least one save in each life, however slow the machine is
    time.sleep(0.0013 * life)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, meta = load_checkpoint(path)
    assert tensors["a"].eq(meta["step"]).all(), meta
    steps.append(meta["step"])
print(len(set(steps)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED_SAVERS, tmp_path / "last.safetensors"]
    lives = subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=180).stdout
    assert int(lives) == 25, "a life in which no save was finished"
    save_checkpoint(tmp_path / "last.safetensors", {"a": torch.ones(1)}, {"step": -1})
    assert load_checkpoint(tmp_path / "last.safetensors")[1] == {"step": -1}


# converting


def convert(state: dict, tmp_path, **options) -> tuple[dict, dict]:
    source, target = tmp_path / "source.ckpt", tmp_path / "target.safetensors"
    torch.save({f"module.{name}": value for name, value in state.items()}, source)
    summary = convert_checkpoint(source, target, **options)
    assert load_checkpoint(target)[1] == summary
    return read_state_dict(target), summary


def test_convert_keep(tmp_path):
    model = Body(TwoWing, own_statistics=True)
    state, summary = convert(model.state_dict(), tmp_path)
    assert_same(state, model.state_dict())
    assert summary == {
        "entries": len(state),
        "parameters": sum(p.numel() for p in model.parameters()),
        "source_format": "torch zip",
        "wings": "keep",
    }


def test_convert_names_the_source_format(tmp_path):
    state, target = Body().state_dict(), tmp_path / "target.safetensors"
    (tmp_path / "old.pt").write_bytes(torch_bytes(state, zipped=False))
    (tmp_path / "net.bin").write_bytes(safetensors.torch.save(state))
    assert convert_checkpoint(tmp_path / "old.pt", target)["source_format"] == "torch legacy"
    assert convert_checkpoint(tmp_path / "net.bin", target)["source_format"] == "safetensors"


def test_convert_to_one_wing(tmp_path):
    source = Body(TwoWing).state_dict()
    ordinary = Body().state_dict()
    for wings, prefix in (("adaptive", ""), ("frozen", "main_bn.")):
        state, _ = convert(source, tmp_path, wings=wings)
        assert state.keys() == ordinary.keys()
        for plain, chosen in zip(bn_names(), bn_names(prefix), strict=True):
            assert torch.equal(state[plain], source[chosen])
        assert torch.equal(state["conv1.weight"], source["conv1.weight"])


def test_convert_to_two_wings(tmp_path):
    source = Body().state_dict()
    state, _ = convert(source, tmp_path, wings="twin")
    assert state.keys() == Body(TwoWing).state_dict().keys()
    for plain, frozen in zip(bn_names(), bn_names("main_bn."), strict=True):
        assert torch.equal(state[frozen], source[plain]) and torch.equal(state[plain], source[plain])


def test_convert_a_single_layer(tmp_path):
    source = TwoWing(3).state_dict()
    assert convert(source, tmp_path, wings="frozen")[0].keys() == nn.BatchNorm2d(3).state_dict().keys()
    plain = nn.BatchNorm2d(3).state_dict()
    assert convert(plain, tmp_path, wings="twin")[0].keys() == source.keys()


@pytest.mark.parametrize(
    "bn, drop, wings, words",
    [
        (nn.BatchNorm2d, None, "adaptive", "no two-wing layers"),
        (nn.BatchNorm2d, None, "frozen", "no two-wing layers"),
        (TwoWing, None, "twin", "two wings already"),
        (TwoWing, "bn1.main_bn.running_var", "frozen", r"lacks bn1\.main_bn\.running_var"),
        (TwoWing, "bn1.running_var", "adaptive", r"lacks bn1\.running_var"),
        (nn.Identity, None, "twin", "no batch norm"),
    ],
)
def test_convert_what_the_file_cannot_serve(tmp_path, bn, drop, wings, words):
    state = Body(bn).state_dict()
    state.pop(drop, None)
    with pytest.raises(CheckpointError, match=f"source.ckpt: .*{wings}.*{words}"):
        convert(state, tmp_path, wings=wings)
    assert not (tmp_path / "target.safetensors").exists()


def test_convert_spares_the_source(tmp_path):
    source = tmp_path / "net.safetensors"
    safetensors.torch.save_file(Body().state_dict(), source)
    whole = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors", tmp_path / "." / "net.safetensors"):
        with pytest.raises(CheckpointError, match="the target is the source"):
            convert_checkpoint(source, target)
    assert source.read_bytes() == whole
    with pytest.raises(ValueError, match="wings must be one of keep"):
        convert_checkpoint(source, tmp_path / "b.safetensors", wings="both")
