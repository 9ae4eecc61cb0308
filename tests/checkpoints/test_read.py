"""Reading files of all formats, damaged and hostile ones among them."""

from __future__ import annotations

import builtins
import functools
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.checkpoints.helpers import FORMATS, Body, assert_same, robustness_checkpoint, save, torch_bytes
from twins_fast.checkpoints import CheckpointError, load_checkpoint, load_state, read_state_dict, save_checkpoint


@FORMATS
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_reads_the_robustness_library(tmp_path, zipped, key):
    state = Body(downstream=None).state_dict()
    assert_same(read_state_dict(save(tmp_path, robustness_checkpoint(state, key), zipped)), state)


def test_reads_scalars_of_either_numpy(tmp_path):
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    state = Body().state_dict()
    data = torch_bytes(robustness_checkpoint(state), zipped=False)
    assert old in data or new in data
    for spelling in (old, new):
        path = tmp_path / "net.ckpt"
        path.write_bytes(data.replace(old, spelling).replace(new, spelling))
        assert_same(read_state_dict(path), state)


def test_reads_parameters_and_a_real_network(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet50(width_per_group=8)
    path = save(tmp_path, {"state_dict": {f"module.{k}": v for k, v in net.state_dict(keep_vars=True).items()}})
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


def test_what_is_read_does_not_write_back(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {})
    read_state_dict(path)["a"].zero_()
    assert read_state_dict(path)["a"].eq(1).all()


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
def test_no_network_in_the_file(tmp_path, content, words):
    with pytest.raises(CheckpointError, match="net.ckpt") as caught:
        read_state_dict(save(tmp_path, content))
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


def test_reading_leaves_the_callers_allow_list_alone(tmp_path):
    path = save(tmp_path, robustness_checkpoint(Body().state_dict()))
    scalar = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        read_state_dict(path)
        assert set(torch.serialization.get_safe_globals()) == before
