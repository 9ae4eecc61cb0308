"""The build description, and installing without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import kernels
from tests import wheels
from tests.modules import load
from twins_fast.ops import native

ROOT = Path(__file__).parents[1]
ARM_CXX = "aarch64-linux-gnu-g++"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture
def description():
    return load("twins_fast_setup", ROOT / "setup.py")


def test_every_source_is_compiled(description, monkeypatch):
    monkeypatch.setattr(description, "pybind11_flags", lambda: "")
    monkeypatch.setattr(description, "cuda_architecture_flags", lambda nvcc: "")
    sources = {source for source, _, _ in description.units("nvcc")}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert sources == present
    assert not any(source.endswith(".cu") for source, _, _ in description.units(None))


def test_other_processors_get_the_baseline_only(description, monkeypatch):
    monkeypatch.setattr(description, "pybind11_flags", lambda: "")
    monkeypatch.setattr(description.platform, "machine", lambda: "aarch64")
    assert [flags for _, name, flags in description.units(None) if "twin_bn" in name] == ["-DTWINS_FAST_ISA=baseline"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM_CXX) is None, reason=f"no {ARM_CXX}")
def test_it_compiles_for_arm(description, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", ARM_CXX)
    monkeypatch.setattr(description.platform, "machine", lambda: "aarch64")
    description.compile_module(tmp_path / "_C.so", tmp_path, None)
    assert int.from_bytes((tmp_path / "_C.so").read_bytes()[18:20], "little") == 183  # EM_AARCH64


def test_finding_nvcc(description, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(description.sys, "platform", "linux")
    monkeypatch.delenv("TWINS_FAST_CUDA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert description.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert description.find_nvcc() is None
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert description.find_nvcc() == str(nvcc)
    monkeypatch.setenv("TWINS_FAST_CUDA", "0")
    assert description.find_nvcc() is None


def test_the_architectures_of_a_build(description, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TWINS_FAST_CUDA", raising=False)
    for wanted, codes in ((None, "80,90,90"), ("90", "90,90"), ("80,90", "80,90,90")):
        if wanted:
            monkeypatch.setenv("TWINS_FAST_CUDA", wanted)
        flags = description.cuda_architecture_flags(str(nvcc))
        assert re.findall(r"compute_(\d+),code", flags) == codes.split(",")
    monkeypatch.setenv("TWINS_FAST_CUDA", "120")
    with pytest.raises(RuntimeError, match="knows none of sm_120"):
        description.cuda_architecture_flags(str(nvcc))


@pytest.mark.skipif(native._C is None, reason="no compiled module")
def test_the_module_needs_no_cuda_library():
    assert not re.search(rb"libcudart\.so", Path(native._C.__file__).read_bytes())


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_cuda_kernels_spill_nothing_and_move_16_bytes(architecture):
    rows = kernels.cuda_kernels((architecture,))
    assert len(rows) == 2 * 3 * 2 * 2 * 2 + 3 * 3  # passes, types, layouts, aligned, one or two adaptive wings
    assert [row for row in rows if row.spilled_bytes] == []
    aligned = [row for row in rows if row.variant.endswith("aligned")]
    assert aligned and all(row.load_bits == row.store_bits == 128 for row in aligned)


@pytest.mark.parametrize("missing", ["compiler works", "compiler exists"])
def test_wheel_without_a_compiler(missing, tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "kernels", "twins_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {**os.environ, "CXX": "false", "TWINS_FAST_CUDA": "0"}
    if missing == "compiler exists":
        environment["PATH"] = str(tmp_path)
        del environment["CXX"]
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    said = [line for line in (build.stdout + build.stderr).splitlines() if "twins-fast" in line]
    assert len(said) == 1 and "installed without compiled kernels" in said[0], build.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_C" in name]
        assert "twins_fast/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    # What backend.py then gives as the reason.
    assert (tmp_path / "site" / "twins_fast" / "_build_failed.txt").read_text().strip() == said[0]


@pytest.mark.parametrize(
    "name, files, said",
    [
        ("manylinux_2_28", {"twins_fast/_C.so": b"\0"}, []),
        ("linux", {"twins_fast/_C.so": b"\0"}, ["not for every Linux"]),
        ("manylinux_2_28", {"twins_fast/x.py": b""}, ["compiled modules: []"]),
        ("manylinux_2_28", {"twins_fast/_C.so": b"", "tests/a.py": b""}, ["does not belong there: tests/a.py"]),
        (
            "manylinux_2_28",
            {"twins_fast/_C.so": bytes(ROOT / "a.h")},
            [f"holds a path of this machine: {path}" for path in sorted(wheels.HERE) if ROOT.is_relative_to(path)],
        ),
    ],
)
def test_what_is_looked_for_in_a_wheel(name, files, said, tmp_path):
    path = tmp_path / f"twins_fast-1-cp311-cp311-{name}_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    assert wheels.problems(path) == said
