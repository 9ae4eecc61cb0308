"""Reading files of all formats, damaged and hostile ones among them."""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.checkpoints.helpers import (
    FORMATS,
    Body,
    assert_same,
    file_with_pickle,
    robustness_checkpoint,
    save,
    torch_bytes,
)
from twins_fast.checkpoints import CheckpointError, load_checkpoint, load_state, read_state_dict, save_checkpoint


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_reads_the_robustness_library(tmp_path, zipped, key, protocol):
    state = Body(downstream=None).state_dict()
    assert_same(read_state_dict(save(tmp_path, robustness_checkpoint(state, key), zipped, protocol)), state)


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


@FORMATS
def test_keys_are_listed_in_bounds(tmp_path, zipped):
    data = b"\x80\2})" + b"\x85" * 1000 + b"Ns."
    with pytest.raises(CheckpointError, match=r"net.ckpt: holds no tensors; its keys are \(") as caught:
        read_state_dict(file_with_pickle(tmp_path, data, zipped))
    assert len(str(caught.value)) < 1000
    many = {f"{number:09}" * 100: number for number in range(10_000)}
    with pytest.raises(CheckpointError, match="its keys are '0000000000") as caught:
        read_state_dict(save(tmp_path, many, zipped))
    assert len(str(caught.value)) < 5000


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


NOT_CHECKPOINTS = {
    "empty": (b"", "the file is empty"),
    "html": (b"<!DOCTYPE html>\n<html>not found</html>\n", "neither a zip archive nor"),
    "text that starts like an import": (b"contents\nabout\nchapter one\n", "neither a zip archive nor"),
    "text like another import": (b"import torch\nimport os\n", "neither a zip archive nor"),
    "text that starts like a persistent id": (b"Please\ncontents\nabout\n", "neither a zip archive nor"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(200)), "neither a zip archive nor"),
    "zeros": (bytes(64), "neither a zip archive nor"),
    "random": (np.random.default_rng(0).bytes(5000), "neither a zip archive nor"),
    "random after a pickle's head": (b"\x80\4" + np.random.default_rng(1).bytes(5000), "torch.save did not write"),
    "npz": (npz(), "a zip archive that torch.save did not write"),
    "zip cut short": (torch_bytes({"a": torch.ones(9)}, True)[:-40], "cut short or damaged"),
    "newer zip cut short": (torch_bytes({"a": torch.ones(9)}, True, 4)[:-40], "cut short or damaged"),
    "legacy cut short": (torch_bytes({"a": torch.ones(9)}, False)[:-4], "the file ends early"),
    "newer legacy cut short": (torch_bytes({"a": torch.ones(9)}, False, 4)[:60], "the file ends early"),
    "tar": (tar(), "a tar archive"),
    "start of a zip": (b"PK\3\4", "cut short or damaged"),
    "start of a pickle": (b"\x80\2", "the file ends early"),
    "start of a newer pickle": (b"\x80\4\x95", "the file ends early"),
    "another pickle": (pickle.dumps({"a": [1.5] * 9}, 2), "a pickle that torch.save did not write"),
    "another newer pickle": (pickle.dumps({"a": [1.5] * 9}, 5), "a pickle that torch.save did not write"),
    "a letter": (b"P", "neither a zip archive nor"),
    "a stop": (b".", "neither a zip archive nor"),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
@pytest.mark.parametrize("show_stack", ["0", "1"])
def test_not_a_checkpoint(tmp_path, monkeypatch, name, suffix, show_stack):
    monkeypatch.setenv("TORCH_SHOW_CPP_STACKTRACES", show_stack)
    path = tmp_path / f"net{suffix}"
    data, reason = NOT_CHECKPOINTS[name]
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a checkpoint: ") and len(message) < len(str(path)) + 250
    if suffix == ".ckpt":
        assert reason in message
    for noise in ("\n", "weights_only", "frame #", ".cc", "allowlist", "Traceback", "tempfile"):
        assert noise not in message


def test_a_missing_record_is_said_without_the_stack(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_SHOW_CPP_STACKTRACES", "1")
    data = io.BytesIO(torch_bytes({"a": torch.ones(9)}, True))
    path = tmp_path / "net.ckpt"
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("data/0"):
                new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="net.ckpt: not a checkpoint: .*data/0.*not found$"):
        read_state_dict(path)


def test_a_directory(tmp_path):
    for name in ("net.ckpt", "net.safetensors"):
        (tmp_path / name).mkdir()
        for read in (read_state_dict, load_checkpoint):
            with pytest.raises(CheckpointError, match=f"{name}: not a checkpoint: it is a directory$"):
                read(tmp_path / name)


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

    def __call__(self):
        raise NotImplementedError("so that it can be what another one calls")


def pickled(content, form: str) -> bytes:
    protocol = int(form[-1])
    return (
        pickle.dumps(content, protocol) if form[:-1] == "bare" else torch_bytes(content, form[:-1] == "zip", protocol)
    )


FORMS = [f"{kind}{protocol}" for kind in ("zip", "legacy", "bare") for protocol in range(2, 6)]


@pytest.mark.parametrize("form", [*FORMS, "bare0", "bare1"])
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "evil, name",
    [
        (Calls(builtins.eval, "1"), "builtins.eval"),
        (Calls(builtins.getattr, "a", "b"), "builtins.getattr"),
        (Calls(Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"), "true"), "builtins.getattr"),
        (functools.partial(print), "functools.partial"),
        (Calls(shutil.rmtree, "absent"), "shutil.rmtree"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.ones(3), "numpy._?core.(multiarray._reconstruct|numeric._frombuffer)"),
        (np.array([print]), "numpy._?core.multiarray._reconstruct"),
        (frozenset([1]), "builtins.frozenset"),
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
