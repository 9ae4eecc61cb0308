"""The code of README and documents runs, their commands are ones, and docstrings speak of arguments that there are."""

import argparse
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

import twins_fast
from bench.report import DOCUMENTS, ROOT
from twins_fast.models import build_model
from twins_fast.train import cli
from twins_fast.train.recipes import RECIPES, get_recipe
from twins_fast.train.run_folder import RunFolder

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (*DOCUMENTS, ROOT / "CONTRIBUTING.md")}
BLOCKS = [
    (page, language, block)
    for page, text in PAGES.items()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
SHORTER = {"count=640": "count=64", "count=64)[0]": "count=16)[0]", "apgd50": "apgd5"}
QUICK = ("recipes", "info")  # the commands that are run, not only parsed
NOT_RUN = {
    "pip install .": "compiles for minutes; tests/test_build.py builds",
    ".venv/bin/python -m bench.report": "writes the documents; tests/test_readme.py has what it writes",
}


def test_every_block_is_known():
    run = {"python", "sh", "diff"}  # diff: tests/compat/test_drop_in.py
    assert {language for _, language, _ in BLOCKS} == run | {"bibtex", "text", ""}


@pytest.mark.parametrize("page", dict.fromkeys(page for page, language, _ in BLOCKS if language == "python"))
def test_the_code_runs(page):
    """In one namespace for each page, of what its text presupposes: a network, images, and no robust one among them."""
    torch.manual_seed(0)
    model, images = build_model("cifar-resnet18-w16", 10), torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        labels = (model.eval()(images).argmax(1) + 1) % 10  # so that AutoAttack is quickly done
    names = {"model": model, "images": images, "labels": labels, "loader": [(images, labels)]}
    moved = []
    for block in (block for own, language, block in BLOCKS if (own, language) == (page, "python")):
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, page, "exec"), names)
        if "adversarial" in names:
            moved.append(float((names["adversarial"] - names["images"]).abs().max()))
    assert not moved or 0 < max(moved) <= 8 / 255 + 1e-6
    if "metrics" in names:
        assert 0 < float(names["metrics"]["loss"]) < 100


def commands():
    for page, language, block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words:
                yield page, words


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("page", dict.fromkeys(page for page, _ in commands()))
def test_the_commands_are_commands(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/mine", "runs/a"):
        Path(run).mkdir(parents=True)
        RunFolder(run).create(get_recipe("cub200"), None)
    for words in (words for own, words in commands() if own == page):
        words, target = (words[:-2], words[-1]) if ">" in words else (words, "output")
        if " ".join(words) in NOT_RUN:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[1] == "-m":
            assert_parses(words[2], words[3:], monkeypatch)
        elif words[0] == "twins-fast" and words[1] in QUICK:
            with redirect_stdout(Path(target).open("w")):
                assert cli.main(words[1:]) == 0
        else:  # torchrun has options of its own before ours
            start = 1 if words[0] == "twins-fast" else words.index("twins_fast") + 1
            assert words[:start] == ["twins-fast"] or words[start - 3 : start - 1] == ["-m", "--"]
            assert cli._parse(words[start:]) is not None or "--help" in words


def assert_parses(module, arguments, monkeypatch):
    """The module takes the arguments; it is ended there."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(*of):
        parse(*of)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises((Parsed, SystemExit)) as ended:
            runpy.run_module(module, run_name="__main__")
    assert ended.type is Parsed or not ended.value.code


def test_every_recipe_is_described():
    for name in RECIPES:
        assert f"`{name}`" in PAGES["docs/recipes.md"] + PAGES["docs/fine-tune.md"], name


PUBLIC = [
    (module, name)
    for module in ("attacks", "checkpoints", "evaluation", "methods", "models", "nn", "ops", "qualify")
    for name in importlib.import_module(f"twins_fast.{module}").__all__
]


@pytest.mark.parametrize("module, name", PUBLIC)
def test_docstrings_name_arguments(module, name):
    thing = getattr(importlib.import_module(f"twins_fast.{module}"), name)
    if not callable(thing):
        return
    assert thing.__doc__, "it has no docstring"
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(thing), re.DOTALL | re.MULTILINE)
    if section:
        named = re.findall(r"^    ([\w*]+(?:, [\w*]+)*): ", section[1], re.MULTILINE)
        named = {part.strip("*") for names in named for part in names.split(", ")}
        assert named and named <= set(inspect.signature(thing).parameters)


def test_the_reference_has_all_names_of_the_package_and_no_others():
    for name in twins_fast.__all__:
        assert f"`{name}`" in PAGES["docs/api/index.md"], name
    for path in re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE):
        assert pkgutil.resolve_name(path), path


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_site_has_every_page():
    def pages(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {f"docs/{page}" for page in listed} == {page for page in PAGES if page.startswith("docs/")}
