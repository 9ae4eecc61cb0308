"""Tables and files of an evaluation."""

import csv
import io

import numpy as np
import pytest
import torch

from twins_fast.evaluation import Column, Results, attack_named
from twins_fast.evaluation.results import worst_case


@pytest.fixture
def results():
    labels = torch.tensor([0] * 6 + [1] * 4)
    rows = []
    for eps, robust in ((4 / 255, 6), (8 / 255, 3)):
        clean = Column(attack_named("clean"), 8 / 255 if eps == 8 / 255 else eps, torch.arange(10) < 8)
        pgd = Column(attack_named("pgd10"), eps, torch.arange(10) < robust, images=torch.rand(10, 3, 2, 2))
        square = Column(attack_named("square"), eps, torch.arange(10) > 1)
        rows += [clean, pgd, square, worst_case([clean, pgd, square])]
    return Results(tuple(rows), labels, "linf", ("cat", "dog", "frog"), ("mind the gap",), torch.rand(10, 3, 2, 2))


def test_the_table(results):
    assert str(results) == (
        "| 10 images, linf | clean | PGD-10 | Square | all |\n"
        "|---|---|---|---|---|\n"
        "| eps 4/255 | 80.0 ± 12.6 % | 60.0 ± 15.5 % | 80.0 ± 12.6 % | 40.0 ± 15.5 % |\n"
        "| eps 8/255 | 80.0 ± 12.6 % | 30.0 ± 14.5 % | 80.0 ± 12.6 % | 10.0 ± 9.5 % |\n\n"
        "warning: mind the gap"
    )


def test_the_classes(results):
    first, second = results.per_class().split("\n\n")
    assert "| eps 4/255 | images | clean | PGD-10 | Square | all |" in first and "eps 8/255" in second
    assert "| cat | 6 | 100.0 ± 0.0 % | 50.0 ± 20.4 % | 66.7 ± 19.2 % | 16.7 ± 15.2 % |" in second
    assert "| frog | 0 | none | none | none | none |" in second


def test_csv(results):
    lines = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert len(lines) == 8 * 4
    (one,) = [r for r in lines if (r["attack"], r["class"]) == ("pgd10", "dog") and float(r["eps"]) == 4 / 255]
    assert (one["images"], one["accuracy"]) == ("4", "0.0")
    assert {r["accuracy"] for r in lines if r["class"] == "frog"} == {""}


def test_plain_data(results):
    plain = results.to_plain()
    assert plain["images"] == 10 and plain["alarms"] == ["mind the gap"]
    one = plain["results"][1]
    assert (one["attack"], one["title"], one["accuracy"]) == ("pgd10", "PGD-10", pytest.approx(0.6))
    assert one["classes"] == {"cat": 1.0, "dog": 0.0, "frog": None}


def test_images(results):
    with np.load(io.BytesIO(results.to_npz()), allow_pickle=False) as file:
        assert sorted(file.files) == ["classes", "clean", "labels", "pgd10-eps0.0156863", "pgd10-eps0.0313725"]
        assert file["pgd10-eps0.0313725"].shape == file["clean"].shape == (10, 3, 2, 2)
