"""Broken files, made from good ones by seeded mutations, and what reads them, watched and within limits.

``python -m tests.fuzz KIND[,KIND...] FOLDER FIRST COUNT`` reads COUNT files of each kind, one after the other.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from twins_fast import verdicts
from twins_fast.checkpoints import CheckpointError, load_checkpoint, read_meta, read_state_dict, save_checkpoint
from twins_fast.evaluation.record import Outcome, Record
from twins_fast.train.comparison import compared, comparison_table
from twins_fast.train.config_file import read_recipe, recipe_as_toml
from twins_fast.train.datasets import DataError, load_datasets
from twins_fast.train.recipe import RecipeError
from twins_fast.train.recipes import get_recipe
from twins_fast.train.run_folder import RunError, RunFolder

SECONDS, MEMORY = 10, 1 << 30  # of reading one file; beyond what the process has taken before
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"99999999999", b"1" + b"0" * 400, b"null", b"[]", b'"0"', b"true", b"{}")
SIZES = (0, 1, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


class Kind(NamedTuple):
    """Files of one kind.

    Attributes:
        make: writes good ones into a folder.
        read: reads what is in a folder; its result does not matter.
        errors: what it may raise of broken ones.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


def _network() -> dict[str, torch.Tensor]:
    state = {"conv1.weight": torch.rand(4, 3, 3, 3), "bn1.weight": torch.rand(4), "bn1.bias": torch.rand(4)}
    state |= {"bn1.running_mean": torch.rand(4), "bn1.running_var": torch.rand(4)}
    return state | {"bn1.num_batches_tracked": torch.tensor(7), "fc.weight": torch.rand(5, 4), "fc.bias": torch.rand(5)}


def _checkpoints(folder: Path) -> None:
    state = _network()
    save_checkpoint(folder / "own", state, {"step": 3, "recipe": get_recipe("mini").to_dict()})
    torch.save(state, folder / "zip")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "nested")
    torch.save({"state_dict": state, "acc": np.float64(0.5)}, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save(state, folder / "newer", pickle_protocol=5)
    (folder / "plain").write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}, protocol=4))


def _read_checkpoint(folder: Path) -> None:
    for path in _files(folder):
        for read in (read_state_dict, load_checkpoint, read_meta):
            with contextlib.suppress(CheckpointError):
                read(path)


def _arrays(folder: Path) -> None:
    images, labels = np.arange(10 * 8 * 8 * 3, dtype=np.uint8).reshape(10, 8, 8, 3), np.arange(10) % 5
    arrays = dict(train=images, train_labels=labels, test=images, test_labels=labels)
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "small.npz", classes=np.array(list("abcde")), **arrays)


def _read_arrays(folder: Path) -> None:
    for path in _files(folder):
        with contextlib.suppress(DataError):
            load_datasets("npz", path)


def _run(folder: Path) -> None:
    run = RunFolder(folder)
    run.create(get_recipe("mini"), None)
    for step in range(3):
        run.log(kind="train", step=step, epoch=0, loss=1.5, accuracy=0.5, lr=0.1, seconds=0.2)
        run.log(kind="validation", step=step, epoch=0, clean=0.5, robust=0.25, images=100)
    figures = {"clean": 0.5, "robust": 0.25, "images": 100, "epoch": 1}
    run.result.write_text(json.dumps({"step": 2, "best": figures, "after": figures, "seconds": 3.5}))
    found = {"title": "PGD-10", "attack": "pgd10", "eps": 8 / 255, "accuracy": 0.5}
    run.evaluated.write_text(json.dumps({"step": 3, "norm": "linf", "images": 10, "results": [found]}))
    save_checkpoint(run.best, _network(), {"step": 3})


def _read_run(folder: Path) -> None:
    run = RunFolder(folder)
    comparison_table(compared({"run": run}))
    run.read_evaluation()
    run.rewind_metrics(1, 1)


def _recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text(recipe_as_toml(get_recipe("mini")))


def _record(folder: Path) -> None:
    record = Record(folder / "record", folder / "images")
    for key in "ab":
        record.add(key, Outcome(torch.tensor([True, False]), (0.5, 1.5), 2, 0.1, torch.rand(2, 3, 4, 4)), "PGD")


def _read_record(folder: Path) -> None:
    record = Record(folder / "record", folder / "images")
    for key in "ab":
        record.get(key)


def _verdicts(folder: Path) -> None:
    content = {"key": {"device": "a"}, "verdicts": {"attack": ["passed", "", 1.5]}}
    (folder / "verdicts.json").write_text(json.dumps(content))


KINDS = {
    "checkpoints": Kind(_checkpoints, _read_checkpoint, ()),
    "arrays": Kind(_arrays, _read_arrays, ()),
    "run": Kind(_run, _read_run, (RunError, CheckpointError)),
    "recipe": Kind(_recipe, lambda folder: read_recipe(folder / "recipe.toml"), (RecipeError,)),
    "record": Kind(_record, _read_record, ()),
    "verdicts": Kind(_verdicts, lambda f: verdicts._read(f / "verdicts.json", {"device": "a"}), ()),
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def mutated(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """``data`` with one to four mutations; ``other`` is a file to take parts from."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(_MUTATIONS)(data, other, draw)
    return data


def _place(data: bytes, draw: random.Random) -> tuple[int, int]:
    begin = draw.randrange(len(data) + 1)
    return begin, min(len(data), begin + int(2 ** draw.uniform(0, 10)))


def _bits(data: bytes, other: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8) if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _filled(data: bytes, other: bytes, draw: random.Random) -> bytes:
    begin, end = _place(data, draw)
    return data[:begin] + draw.choice((b"\0", b"\xff", b"[", b"{", b"(")) * (end - begin) + data[end:]


def _nested(data: bytes, other: bytes, draw: random.Random) -> bytes:
    begin, _ = _place(data, draw)
    return data[:begin] + draw.choice((b"[", b'{"a":', b"(", b"]")) * draw.choice((10, 5000, 200000)) + data[begin:]


def _moved(data: bytes, other: bytes, draw: random.Random) -> bytes:
    begin, end = _place(data, draw)
    target = draw.randrange(len(data) + 1)
    return data[:target] + data[begin:end] * draw.choice((0, 1, 2, 50)) + data[target:]


def _cut(data: bytes, other: bytes, draw: random.Random) -> bytes:
    begin, end = _place(data, draw)
    return data[:begin] + (data[end:] if draw.random() < 0.5 else b"")


def _spliced(data: bytes, other: bytes, draw: random.Random) -> bytes:
    begin, end = _place(other, draw)
    target, _ = _place(data, draw)
    return data[:target] + other[begin:end] + data[target + end - begin :]


def _sized(data: bytes, other: bytes, draw: random.Random) -> bytes:
    width, begin = draw.choice((2, 4, 8)), draw.randrange(len(data) + 1)
    size = draw.choice(SIZES) % 256**width
    return data[:begin] + size.to_bytes(width, draw.choice(("little", "big"))) + data[begin + width :]


def _numbered(data: bytes, other: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?|\"\w*\"", data))
    if not found:
        return data
    match = draw.choice(found)
    return data[: match.start()] + draw.choice(NUMBERS) + data[match.end() :]


_MUTATIONS = (_bits, _filled, _nested, _moved, _cut, _spliced, _sized, _numbered, _numbered)


class Watch:
    """What happens outside of a folder; a hook cannot be taken away again, so it is told when to look."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
    PATHS = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")

    def __init__(self, folder: Path):
        self.folder = f"{folder.resolve()}/"
        self.looking = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.looking:
            return
        if event in self.NEVER:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "open" and arguments[2] is not None and arguments[2] & self.WRITES:
            self._inside(event, arguments[:1])
        elif event in self.PATHS:
            self._inside(event, [a for a in arguments if isinstance(a, (str, bytes, os.PathLike))])

    def _inside(self, event: str, paths: Iterable) -> None:
        for path in paths:
            whole = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if whole and whole != "/dev/null" and not whole.startswith(self.folder):
                self.seen.append(f"{event} {whole}")


def read_one(kind: Kind, folder: Path, originals: list[tuple[Path, bytes]], seed: str, watch: Watch) -> None:
    """Put the good files back, break one of them, and read.

    Raises:
        Exception: what the reader may not raise.
        AssertionError: it did something outside of the folder.
    """
    draw = random.Random(seed)
    for path, data in originals:
        path.write_bytes(data)
    path, data = draw.choice(originals)
    path.write_bytes(mutated(data, draw.choice(originals)[1], draw))
    signal.alarm(SECONDS)
    watch.looking = True
    try:
        with contextlib.suppress(kind.errors), contextlib.redirect_stderr(io.StringIO()):
            kind.read(folder)
    finally:
        watch.looking = False
        signal.alarm(0)
    assert not watch.seen, watch.seen


def main(names: str, place: str, first: str, count: str) -> None:
    folders = {name: Path(place, name) for name in names.split(",")}
    originals = {}
    torch.manual_seed(0)
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        KINDS[name].make(folder)
        originals[name] = [(path, path.read_bytes()) for path in _files(folder)]
        KINDS[name].read(folder)  # imports what it needs
    os.environ["TMPDIR"] = tempfile.tempdir = place
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    watch = Watch(Path(place))
    for name, folder in folders.items():
        for number in range(int(first), int(first) + int(count)):
            print(name, number, flush=True)  # the last one said is the one that ended this process
            read_one(KINDS[name], folder, originals[name], f"{name} {number}", watch)


if __name__ == "__main__":
    main(*sys.argv[1:])
