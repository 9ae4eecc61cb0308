"""The documents hold exactly what the measurements say, and the README's code runs."""

import re

import torch

from bench import report
from twins_fast.models import build_model
from twins_fast.train.recipes import RECIPES

TEXT = report.README.read_text()


def test_tables_are_those_of_the_files():
    texts = [document.read_text() for document in report.DOCUMENTS]
    assert {name for text in texts for name in re.findall(r"<!-- table (\w+) -->", text)} == set(report.TABLES)
    assert [report.filled(text) for text in texts] == texts


def test_the_code_runs(capsys):
    attack, evaluation, autoattack, fine_tune = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    images, labels = torch.rand(8, 3, 16, 16), torch.randint(0, 10, (8,))
    names = {"model": build_model("cifar-resnet18-w16", 10), "images": images, "labels": labels}
    names["loader"] = [(images, labels)]
    exec(attack, names)
    assert 0 < (names["adversarial"] - images).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        wrong = (names["model"].eval()(images).argmax(1) + 1) % 10  # so that there is nothing to attack
    exec(autoattack, names | {"labels": wrong})
    exec(evaluation, names | {"loader": [(images, wrong)]})
    assert "| 8 images, linf | clean | PGD-10 | APGD-CE | AutoAttack | all |" in capsys.readouterr().out
    assert names["model"].training is False
    before = names["model"].conv1.weight.clone()
    exec(fine_tune, names)
    assert not torch.equal(names["model"].conv1.weight, before)


def test_every_recipe_is_named():
    for name in RECIPES:
        assert f"`{name}`" in TEXT, name
