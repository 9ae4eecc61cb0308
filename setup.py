"""Builds the compiled module twins_fast._C; everything else is in pyproject.toml.

Without a working C++ compiler the package still installs, and runs on plain PyTorch.
TWINS_FAST_CUDA=0 leaves the CUDA kernels out, as does the absence of nvcc.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NOTE = "_build_failed.txt"  # read by twins_fast.ops.native
OBJECTS = ROOT / "build" / "objects"  # kept, so that another build, also for another Python, compiles what changed only
CUDA_ARCHITECTURES = ("80", "90", "100")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}

# Compiled once per instruction set, slowest first. Pixels are rounded as PyTorch rounds them, after every operation.
CPU_UNITS = {"conv": "", "direct": "", "twin_bn": "", "pointwise": "", "pixels": "-ffp-contract=off"}
ONLY = {"amx": "conv"}  # the unit that an instruction set is for; it has others as the one before


def units(nvcc: str | None, isas: list[str] | None = None) -> list[tuple[str, str, str]]:
    """What is compiled: (source, object, extra flags). CUDA sources end in .cu; ``isas`` as from :func:`isas_of`."""
    isas = isas_of(None) if isas is None else isas
    kernels = []
    for unit, unit_flags in CPU_UNITS.items():
        for isa in ("baseline", *isas):
            if ONLY.get(isa, unit) != unit:
                continue
            flags = f"-DTWINS_FAST_ISA={isa} {X86_FLAGS.get(isa, '')} {unit_flags}".strip()
            kernels.append((f"csrc/cpu/{unit}.cpp", f"{unit}_{isa}.o", flags))
    define = "-DTWINS_FAST_CUDA" if nvcc else ""
    common = [
        ("csrc/bind.cpp", f"bind.{sysconfig.get_config_var('SOABI')}.o", f"{define} {pybind11_flags()}"),
        ("csrc/cpu/dispatch.cpp", "dispatch.o", " ".join(f"-DTWINS_FAST_HAS_{isa}" for isa in isas)),
    ]
    cuda = []
    if nvcc:
        flags = cuda_architecture_flags(nvcc)
        cuda = [(f"csrc/cuda/{unit}.cu", f"{unit}_cuda.o", flags) for unit in ("twin_bn", "pixels")]
    return cuda + common + kernels  # slowest first


def isas_of(cxx: str | None) -> list[str]:
    """Instruction sets beyond the baseline that this machine's kind has and the compiler, if given, knows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []

    def knows(flags: str) -> bool:
        command = [*shlex.split(cxx), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return [isa for isa, flags in X86_FLAGS.items() if cxx is None or knows(flags)]


def pybind11_flags() -> str:
    import pybind11

    return " ".join([include(pybind11.get_include()), include(sysconfig.get_path("include")), "-fvisibility=hidden"])


def include(folder: str | Path) -> str:
    return shlex.quote(f"-I{folder}")


def escaped(path: str | Path) -> str:
    """A path in a build line of ninja, which quotes it for the shell itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def cuda_architecture_flags(nvcc: str) -> str:
    """Machine code for each architecture that this nvcc knows, and PTX of the newest for later ones.

    ``TWINS_FAST_CUDA=90``, for one, asks for that architecture alone, which takes a third of the time.
    """
    wanted = tuple(filter(None, os.environ.get("TWINS_FAST_CUDA", "").split(","))) or CUDA_ARCHITECTURES
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    chosen = [arch for arch in wanted if f"sm_{arch}" in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of sm_{', sm_'.join(wanted)}")
    code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return " ".join([*code, f"-gencode arch=compute_{chosen[-1]},code=compute_{chosen[-1]}", "--threads 2"])


def find_nvcc() -> str | None:
    if os.environ.get("TWINS_FAST_CUDA") == "0" or sys.platform != "linux":
        return None
    home = os.environ.get("CUDA_HOME")
    in_home = Path(home, "bin", "nvcc") if home else None
    return str(in_home) if in_home and in_home.exists() else shutil.which("nvcc")


def compile_module(target: Path, folder: Path, nvcc: str | None) -> None:
    """Write ``folder/build.ninja`` and run it, so that the units compile in parallel."""
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if cxx is None:
        raise RuntimeError("no C++ compiler found")
    openmp = "" if sys.platform == "darwin" else "-fopenmp"
    link = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    # Copies of a loop for each of its branches double what is compiled, and were no faster.
    host = f"-O3 -fno-unswitch-loops -fPIC -std=c++17 -fno-math-errno -fno-trapping-math -Wno-psabi -DNDEBUG {openmp}"
    linker = f"{nvcc} -ccbin {cxx} -cudart static -Xcompiler -fopenmp" if nvcc else f"{cxx} {openmp}"
    lines = [
        f"includes = {include(ROOT / 'csrc')} {include(ROOT / 'csrc' / 'include')}",
        f"rule cxx\n command = {cxx} {host} $includes $flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d",
        f"rule cuda\n command = {nvcc} -ccbin {cxx} -O3 -std=c++17 -Xcompiler -fPIC $includes $flags -MD -MF $out.d "
        "-c $in -o $out\n depfile = $out.d",
        f"rule link\n command = {linker} {link} $in -o $out",
    ]
    objects = []
    for source, name, flags in units(nvcc, isas_of(cxx)):
        rule = "cuda" if source.endswith(".cu") else "cxx"
        lines.append(f"build {name}: {rule} {escaped(ROOT / source)}\n flags = {flags}")
        objects.append(name)
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}\ndefault {escaped(target)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    run = subprocess.run([find_ninja(), "-C", str(folder)], capture_output=True, text=True)
    if run.returncode:
        failed = next((line for line in run.stdout.splitlines() if "error" in line or line.startswith("FAILED")), "")
        raise RuntimeError(f"the compiler failed: {failed.strip()}")


def find_ninja() -> str:
    import ninja

    return str(Path(ninja.BIN_DIR, "ninja"))


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = target.parent / NOTE
        note.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        failures = []
        for nvcc in dict.fromkeys((find_nvcc(), None)):
            try:
                compile_module(target, OBJECTS, nvcc)
                break
            except Exception as error:
                failures.append(" ".join(str(error).split()))
        else:
            # A new list: the distribution keeps its own, and stays one for this platform.
            self.extensions = [other for other in self.extensions if other is not ext]
        if failures:
            what = "CUDA kernels" if target.exists() else "compiled kernels"
            message = f"twins-fast: installed without {what} ({failures[0 if target.exists() else -1]})"
            print(message, file=sys.stderr)
            note.write_text(message + "\n")

    def copy_extensions_to_source(self) -> None:
        """An in-place (editable) build gets the note of what failed, or loses that of an earlier failure."""
        super().copy_extensions_to_source()
        note = Path(self.build_lib, "twins_fast", NOTE)
        source = ROOT / "twins_fast"
        (source / NOTE).unlink(missing_ok=True)
        if note.exists():
            shutil.copy(note, source)
            if not self.extensions:
                for outdated in source.glob("_C*.so"):
                    outdated.unlink()


if __name__ == "__main__":
    setup(
        packages=find_namespace_packages(include=["twins_fast", "twins_fast.*"]),
        ext_modules=[Extension("twins_fast._C", sources=[])],
        cmdclass={"build_ext": BuildWithNinja},
    )
