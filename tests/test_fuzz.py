"""Whatever is in a file, reading it ends soon, with a result or an error of its own, and touches nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parent.parent
HARM = """
import os, sys
from tests import fuzz
place, elsewhere = sys.argv[1:]
harms = {
    "outside": lambda: open(elsewhere, "w").close(),
    "process": lambda: os.system("true"),
    "memory": lambda: bytearray(2 * fuzz.MEMORY),
    "error": lambda: [][0],
    "time": lambda: exec("while True: pass"),
}
read_one, fuzz.SECONDS = fuzz.read_one, 1
for name, harm in harms.items():
    child = os.fork()
    if child == 0:
        harmless = True
        def read(folder): harmless or harm()
        def read_harm(*arguments): globals().update(harmless=False); read_one(*arguments)
        fuzz.KINDS["bad"] = fuzz.Kind(lambda folder: (folder / "a").write_bytes(b"a"), read, ())
        fuzz.read_one = read_harm
        try:
            fuzz.main("bad", f"{place}/{name}", "0", "1")
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def read_broken_files(folder, first, count):
    command = [sys.executable, "-m", "tests.fuzz", ",".join(fuzz.KINDS), str(folder), str(first), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert done.returncode == 0, f"{said[-1:]}, {folder}: {done.returncode}\n{done.stderr[-3000:]}"
    assert len(said) == count * len(fuzz.KINDS)


def test_some_broken_files(tmp_path):
    read_broken_files(tmp_path, 0, 20)


@pytest.mark.slow
def test_many_broken_files(tmp_path):
    read_broken_files(tmp_path, 20, 400)


def test_harm_is_seen(tmp_path):
    """Of readers that do what none may do."""
    command = [sys.executable, "-c", HARM, str(tmp_path), str(tmp_path / "elsewhere")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "outside AssertionError ['open " in said and 'process AssertionError ["os.system ' in said
    assert "memory MemoryError" in said and "error IndexError" in said
    assert "time -14\n" in said  # SIGALRM
