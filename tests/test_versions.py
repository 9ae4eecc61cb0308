"""The releases that ``make test-versions`` runs are those that the package is said to be for."""

from pathlib import Path

from tests import versions
from twins_fast.train.config_file import tomllib

ROOT = Path(__file__).parent.parent
NOWHERE = versions.Versions("3.99", "2.0.0", "0.15.0", "1.26.4")


def test_the_package_asks_for_the_oldest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, *later = versions.listed()
    assert f"torch>={oldest.torch.removesuffix('.0')}" in project["dependencies"]
    assert project["requires-python"] == f">={oldest.python}"
    pythons = {each.python for each in (oldest, *later)}
    assert {f"Programming Language :: Python :: {python}" for python in pythons} <= set(project["classifiers"])


def test_a_missing_python_is_a_failure_and_the_others_are_tested(monkeypatch, capsys):
    installed, *_ = versions.listed()
    monkeypatch.setattr(versions, "listed", lambda: [NOWHERE, installed])
    tested = versions.tested
    monkeypatch.setattr(versions, "tested", lambda v, words: tested(v, words) if v is NOWHERE else f"passed: {words}")
    assert versions.main(["tests/nn"]) == 1
    *_, missing, passed = capsys.readouterr().out.splitlines()
    assert missing.endswith("not installed: no python3.99 on the PATH") and passed.endswith("passed: ['tests/nn']")
