"""What is handed out: the description of the package, how to cite it, and the source distribution."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import twins_fast

ROOT = Path(__file__).parent.parent
OF_THE_REPOSITORY = {".ci/run", ".github/workflows/packages.yml", ".gitignore"}
LINK = "twins_fast/kernels"  # a link in the repository, a folder in the archive


def tracked():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [name for name in run.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source distribution of the tracked files."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, capture_output=True, text=True, check=True)
    (path,) = (folder / "dist").iterdir()
    return path


def test_the_archive_holds_what_is_tracked(archive):
    with tarfile.open(archive) as file:
        members = {member.name.partition("/")[2] for member in file if member.isfile()}
    assert set(tracked()) - members == OF_THE_REPOSITORY | {LINK}
    kernels = {name.removeprefix(f"{LINK}/") for name in members if name.startswith(LINK)}
    assert kernels == {name.removeprefix("kernels/") for name in members if name.startswith("kernels/")} != set()
    others = {name for name in members - set(tracked()) if not name.startswith((LINK, "twins_fast.egg-info"))}
    assert others == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_archive_passes_its_own_tests(archive, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_structure.py",
        "tests/models",
    ]
    command += ["tests/test_package.py::test_the_citation"]
    run = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_version_stands_in_one_place(archive):
    assert archive.name == f"twins_fast-{twins_fast.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        lines = file.extractfile(f"twins_fast-{twins_fast.__version__}/PKG-INFO").read().decode().splitlines()
    assert f"Version: {twins_fast.__version__}" in lines and "Author: The twins-fast authors" in lines
    assert "License-Expression: MIT" in lines and "License-File: LICENSE" in lines


def test_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # which the format asks for
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "twins-fast"
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()  # likewise
    assert paper["title"].startswith("TWINS: A Fine-Tuning Framework") and paper["year"] == 2023
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Xu", "Ji", "Chan"]
    assert paper["identifiers"][0]["value"] == "arXiv:2303.11135"
