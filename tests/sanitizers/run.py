"""Runs tests with g++'s sanitizers in the C++ kernels: ``python -m tests.sanitizers.run [SANITIZER [TESTS]]``.

PyTorch and Python have none in them, but it is the sanitizer that allocates their memory. The thread sanitizer gets one
instruction set: threads share the work in the same way in all, but for the matrix unit.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.modules import load

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
TESTS = ["tests/ops/test_twin_bn.py", "tests/attacks/engine/executors", "tests/csrc/test_cuda.py"]
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=all", "thread": "-fsanitize=thread"}
INTRINSICS = f"-include {HERE / 'intrinsics.h'}"
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
}


def build(sanitizer: str) -> Path:
    """The module _C; what has not changed since the last time is not compiled again."""
    setup = load("twins_fast_setup", ROOT / "setup.py")
    units, folder = setup.units, ROOT / "build" / f"sanitizer-{sanitizer}"
    openmp = (str(HERE / "openmp.cpp"), "openmp.o", "")
    known = setup.isas_of("g++") if sanitizer == "address" else []

    def chosen(nvcc, isas):
        all_units = [*units(nvcc, known), *([openmp] if sanitizer == "thread" else [])]
        return [(source, name, f"{flags} -O1") for source, name, flags in all_units]

    setup.units = chosen
    os.environ["CXX"] = f"g++ -g1 {FLAGS[sanitizer]} {INTRINSICS if sanitizer == 'address' else ''}"
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    setup.compile_module(target, folder, None)
    return target


def file_of_gcc(name: str) -> str:
    run = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def run_tests(sanitizer: str, tests: list[str]) -> int:
    path = build(sanitizer)
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "CUDA_EMULATOR_SANITIZERS": FLAGS[sanitizer],
        # With the library of C++, in which the sanitizer looks for what throws before PyTorch brings it.
        "LD_PRELOAD": f"{file_of_gcc(LIBRARIES[sanitizer])} {file_of_gcc('libstdc++.so.6')}",
    }
    run = [sys.executable, "-m", "tests.sanitizers.run", "inside", str(path), *tests]
    return subprocess.run(run, env=environment, cwd=ROOT).returncode


def inside(path: str, tests: list[str]) -> int:
    """In a process that has the sanitizer's library in it from the start."""
    import pytest
    import torch

    del os.environ["LD_PRELOAD"]  # not into the compiler
    torch.set_num_threads(2)
    sys.modules["twins_fast._C"] = load("twins_fast._C", Path(path))
    return pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *tests])  # what it says comes past Python


def main() -> int:
    which, *tests = sys.argv[1:] or ["all"]
    if which == "inside":
        return inside(tests[0], tests[1:])
    return max(run_tests(sanitizer, tests or TESTS) for sanitizer in (FLAGS if which == "all" else [which]))


if __name__ == "__main__":
    raise SystemExit(main())
