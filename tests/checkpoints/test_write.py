"""Writing files that survive a failed or killed save."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoints.helpers import assert_same
from twins_fast.checkpoints import load_checkpoint, save_checkpoint, write_atomically


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


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 0})

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"no space left: '{path}'"):
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
