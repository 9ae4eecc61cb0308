"""The tests with each line of versions.txt: ``python -m tests.versions``, then what pytest is to run, if not all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Versions(NamedTuple):
    python: str
    torch: str
    torchvision: str
    numpy: str

    @property
    def folder(self) -> Path:
        return ROOT / "runs" / "versions" / f"{self.python}-{self.torch}"


def listed() -> list[Versions]:
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    return [Versions(*line.split()) for line in lines if not line.startswith("#")]


def install(versions: Versions) -> Path:
    """The package as it is, in an environment of its own, made at the first call: its Python."""
    name = f"python{versions.python}"
    python = versions.folder / "bin" / "python"
    if not python.exists():
        found = shutil.which(name)
        if found is None:
            raise FileNotFoundError(f"no {name} on the PATH")
        subprocess.run([found, "-m", "venv", versions.folder], check=True)
    # Compiled modules lie side by side, one for each Python: that of .venv keeps its CUDA kernels.
    cuda = {} if (ROOT / ".venv" / "bin" / name).exists() else {"TWINS_FAST_CUDA": "0"}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [f"{name}=={getattr(versions, name)}" for name in ("torch", "torchvision", "numpy")]
    subprocess.run([*pip, "--editable", ".[test]", *wanted], cwd=ROOT, env={**os.environ, **cuda}, check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", "tests/libraries.txt"], cwd=ROOT, check=True)
    return python


def tested(versions: Versions, arguments: list[str]) -> str:
    """What came of the tests: ``"passed"``, or what did not."""
    try:
        python = install(versions)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not installed: {error}"
    report = versions.folder / "tests.xml"
    report.unlink(missing_ok=True)
    pytest = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *arguments]
    run = subprocess.run(pytest, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if not report.exists():
        return f"stopped with status {run.returncode}"
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{'failed' if run.returncode else 'passed'}: {said}"


def main(arguments: list[str]) -> int:
    results = []
    for versions in listed():
        print(" ".join(f"{name} {value}" for name, value in versions._asdict().items()), flush=True)
        results.append((versions, tested(versions, arguments)))
    print(f"\n{'Python':8}{'PyTorch':9}{'torchvision':13}{'NumPy':8}")
    for (python, torch, torchvision, numpy), result in results:
        print(f"{python:8}{torch:9}{torchvision:13}{numpy:8}{result}")
    return int(any(not result.startswith("passed") for _, result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
