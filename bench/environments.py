"""Python environments of their own, below ``runs``: ``python -m bench.environments NAME`` and arguments of pip."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from bench.header import ROOT


def folder_of(name: str) -> Path:
    return ROOT / "runs" / name


def environment(name: str, *arguments: str) -> Path:
    """Its Python, made at the first call: it has what this one has, and what ``pip install`` makes of ``arguments``."""
    folder = folder_of(name)
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        outer = [path for path in sys.path if path.endswith("site-packages")]  # what is there is not installed again
        (packages / "outer.pth").write_text("\n".join(outer) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
        done.touch()
    return python


if __name__ == "__main__":
    print(environment(*sys.argv[1:]))
