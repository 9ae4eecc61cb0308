"""Compiles csrc for the emulated device."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from tests.modules import load

HERE = Path(__file__).parent.resolve()
CXX = shutil.which("g++")
# They stop at a misaligned access and at an index past a shared array; tests/sanitizers asks for others.
SANITIZERS = os.environ.get("CUDA_EMULATOR_SANITIZERS", "-fsanitize=alignment,bounds -fno-sanitize-recover=all")
# Without gnu-unique, two modules in one process have their own shared memory.
CUDA_FLAGS = (
    f"-x c++ -std=c++17 -O1 -g1 -fPIC -fno-gnu-unique -Wno-unknown-pragmas -Wno-attributes -I{shlex.quote(str(HERE))}"
    f" -include cuda_runtime.h {SANITIZERS}"
)
LINK_FLAGS = f"-shared -pthread -fopenmp {SANITIZERS}"


def build(folder: Path, root: Path = HERE.parents[1]) -> Path:
    """The module _C of the repository at ``root``, whose CUDA entry points take host pointers and any stream."""
    setup = load("twins_fast_setup", root / "setup.py")
    setup.cuda_architecture_flags = lambda nvcc: CUDA_FLAGS
    # The CPU kernels are there to be linked, not to be fast.
    includes = [f"-I{HERE}", f"-I{root}/csrc", f"-I{root}/csrc/include"]  # whose ptx.cuh is the emulator's
    common = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-Wno-psabi", *includes]
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source, name, flags in setup.units("emulator", isas=[]):
        objects.append(str(folder / name))
        subprocess.run([CXX, *common, *shlex.split(flags), "-c", str(root / source), "-o", objects[-1]], check=True)
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, *objects, *shlex.split(LINK_FLAGS), "-o", str(target)], check=True)
    return target
