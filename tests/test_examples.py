"""The examples run, on little data."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from matplotlib import pyplot

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_an_own_network_learns(capsys):
    assert example("own_network")(train_images=256, epochs=2) > 0.6
    assert "epoch 2: loss" in capsys.readouterr().out


def test_a_foreign_checkpoint_is_evaluated(capsys, tmp_path):
    """Laid out like the robustness library's."""
    network = torchvision.models.resnet18(num_classes=4)
    torch.save({"model": {f"module.model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "robust.ckpt")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(6) % 4)
    example("evaluate_checkpoint")(tmp_path / "robust.ckpt", tmp_path / "images.npz", arch="resnet18", steps=2)
    said = capsys.readouterr().out
    assert "under PGD-2" in said and "on 6 images" in said


@pytest.mark.slow
def test_a_recipe_runs_from_python(capsys, tmp_path):
    little = {"data": {"batch_size": 256}, "attack": {"steps": 1}, "evaluation": {"steps": 1, "images": 20}}
    example("run_recipe")(tmp_path / "run", optimizer={"epochs": 1}, **little)
    assert "| AT |" in capsys.readouterr().out


def test_the_notebook_runs(monkeypatch, capsys):
    """Its cells one after the other, with fewer steps and images."""
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    cells = json.loads((EXAMPLES / "first_look.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    sizes = "HEAD_STEPS, STEPS, IMAGES = "
    (line,) = re.findall(f"^{sizes}.*$", code[0], re.MULTILINE)
    names = {}
    for number, text in enumerate(code):
        exec(compile(text.replace(line, f"{sizes}2, 2, 16"), f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "| 16 images, linf | clean | PGD-10 |" in said and "lines more" in said
    assert len(names["losses"]["frozen_loss"]) == 2
    pyplot.close("all")


def test_the_notebook_shows_what_it_printed_and_drew():
    """Run from its first cell to its last, without warnings."""
    file = EXAMPLES / "first_look.ipynb"
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} == {"stdout", None}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 3
    assert file.stat().st_size < 300_000
