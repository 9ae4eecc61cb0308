"""Where the tests of the Triton kernels run: in Triton's interpreter, or on a GPU where there is one.

Whether kernels are interpreted is decided when Triton and they are imported, for the whole process. So without a GPU
the tests of results run in a process of their own: each file has a test that runs the file itself there.
"""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RELEASES = {name: tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")}
if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    def _patch_once(fn, patch=interpreter._patch_lang):
        """At each call of a device function Triton looks through its whole language: a quarter of the time."""
        used = [module for module in fn.__globals__.values() if module in (tl, tl.core)]
        if any(tl.core.is_builtin(module.load) for module in used):
            return patch(fn)

    interpreter._patch_lang = _patch_once

_skipped = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in test_in_the_interpreter")

compiles_ahead = pytest.mark.skipif(
    RELEASES["triton"] < (3, 3), reason="ahead-of-time compilation is for Triton 3.3 and later"
)
host = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


def results(test):
    """Runs in the interpreter or on a GPU."""
    return _skipped(test if INTERPRETED else pytest.mark.gpu(test))


def run_in_the_interpreter(file, config):
    """The tests of a file in a process whose kernels are interpreted, unless they run on a GPU in this one."""
    if DEVICE == "cuda":
        pytest.skip("the tests run on the GPU")
    if RELEASES["triton"] < (3, 7) and RELEASES["numpy"] >= (2, 4):
        pytest.skip("Triton's interpreter is too old for NumPy")
    # A backend that this process was told to use would be used in there, too.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TWINS_FAST_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-m", config.getoption("-m"), file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
