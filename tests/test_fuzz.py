"""Whatever is in a file, reading it ends soon, with a result or an error of its own, and touches nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parent.parent


def read_broken_files(kind, folder, first, count):
    command = [sys.executable, "-m", "tests.fuzz", kind, str(folder), str(first), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    number = done.stdout.split()[-1] if done.stdout else "none"
    assert done.returncode == 0, f"{kind}, file {number}, {folder}: {done.returncode}\n{done.stderr[-3000:]}"
    assert int(number) == first + count - 1


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_some_broken_files(kind, tmp_path):
    read_broken_files(kind, tmp_path / "folder", 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_many_broken_files(kind, tmp_path):
    read_broken_files(kind, tmp_path / "folder", 20, 400)


@pytest.mark.parametrize("harm", ["outside", "process", "memory", "error", "time"])
def test_harm_is_seen(harm, tmp_path, monkeypatch):
    """A reader that does what none may do."""
    elsewhere = tmp_path / "elsewhere"
    text = {
        "outside": f"open({str(elsewhere)!r}, 'w').close()",
        "process": "os.system('true')",
        "memory": "bytearray(2 * fuzz.MEMORY)",
        "error": "[][0]",
        "time": "while True: pass",
    }[harm]
    program = (
        f"import os, sys; from tests import fuzz\n"
        f"def read(folder):\n    if fuzz.armed: {text}\n"
        f"fuzz.armed, make = False, lambda folder: (folder / 'a').write_bytes(b'a')\n"
        f"fuzz.KINDS['bad'], one = fuzz.Kind(make, read, ()), fuzz.read_one\n"
        f"def read_one(*arguments): fuzz.armed = True; one(*arguments)\n"
        f"fuzz.read_one, fuzz.SECONDS = read_one, 1\n"
        f"fuzz.main('bad', {str(tmp_path / 'folder')!r}, '0', '1')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    said = {"outside": "open ", "process": "os.system", "memory": "MemoryError", "error": "IndexError", "time": ""}
    assert done.returncode != 0 and said[harm] in done.stderr, done.stderr
