"""The pictures of runs and of evaluations."""

import pytest
import torch
from matplotlib import pyplot as plt

from twins_fast.evaluation import Column, Results, attack_named
from twins_fast.evaluation.results import worst_case
from twins_fast.train.curves import draw_curves
from twins_fast.train.plots import draw_changes, draw_robustness


def lines(robust):
    train = [
        {"kind": "train", "step": n, "epoch": n / 10, "loss": 2 - n / 50, "lr": 0.1, "accuracy": 0.5} | wings
        for n in range(1, 31)
        for wings in [{"frozen_accuracy": 0.4, "adaptive_accuracy": 0.6} if robust else {}]
    ]
    kind = "test" if robust else "validation"
    return train + [{"kind": kind, "step": n, "epoch": n / 10, "clean": 0.8, "robust": 0.4} for n in (10, 20, 30)]


def test_every_axis_says_what_it_shows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw_curves({"twins-at": lines(True), "at": lines(False)}, tmp_path / "curves.png", "a run")
    monkeypatch.undo()
    (figure,) = figures
    loss, rate, training, tests = figure.axes
    assert [axis.get_xlabel() for axis in figure.axes] == ["epoch"] * 4
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss, nats", "learning rate", "accuracy, %", "accuracy, %"]
    assert "under the training attack" in training.get_title()
    assert loss.get_legend_handles_labels()[1] == ["twins-at", "at"]
    assert training.get_legend_handles_labels()[1] == ["twins-at, frozen wing", "twins-at, adaptive wing", "at"]
    assert "twins-at, test, under attack" in tests.get_legend_handles_labels()[1]
    assert len(loss.lines) == 4 and len(loss.lines[0].get_xdata()) == 30  # each step, and smoothed, of each run
    assert loss.lines[0].get_xdata()[-1] == 3 and tests.lines[0].get_ydata()[0] == pytest.approx(80)
    assert rate.lines[0].get_ydata()[0] == 0.1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plt.close(figure)


def test_a_run_without_a_line_is_drawn(tmp_path):
    draw_curves({"at": []}, tmp_path / "curves.png", "nothing yet")
    assert (tmp_path / "curves.png").exists()


def measured():
    labels = torch.arange(12) % 3
    columns = []
    for eps in (4 / 255, 8 / 255):
        clean = Column(attack_named("clean"), eps, torch.arange(12) < 10)
        images = torch.rand(12, 3, 8, 8)
        attacked = Column(attack_named("pgd10"), eps, torch.arange(12) < (6 if eps < 0.02 else 2), images=images)
        columns += [clean, attacked, worst_case([clean, attacked])]
    return Results(tuple(columns), labels, "linf", ("cat", "dog", "frog"), (), torch.rand(12, 3, 8, 8))


def drawn(monkeypatch, draw):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw()
    monkeypatch.undo()
    (figure,) = figures
    plt.close(figure)
    return figure


def test_robustness_over_eps(tmp_path, monkeypatch):
    figure = drawn(monkeypatch, lambda: draw_robustness(measured(), tmp_path / "a.png", "a network"))
    (axis,) = figure.axes
    assert axis.get_title() == "a network" and axis.get_xlabel() == "eps (linf, of 255)"
    assert axis.get_ylabel() == "accuracy on 12 images, %"
    assert axis.get_legend_handles_labels()[1] == ["PGD-10", "all attacks"]
    x, y = axis.containers[0].lines[0].get_data()
    assert list(x) == pytest.approx([0, 4, 8]) and list(y) == pytest.approx([1000 / 12, 50, 200 / 12])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_largest_changes(tmp_path, monkeypatch):
    results = measured()
    sure = torch.linspace(0.1, 0.4, 12)  # of the true class, after the attack

    def probabilities(images):
        right = torch.full((12,), 0.5) if images is results.clean else sure
        others = ((1 - right) / 2).view(-1, 1).expand(-1, 3)
        return others.scatter(1, results.labels.view(-1, 1), right.view(-1, 1))

    column = results["pgd10", 8 / 255]
    figure = drawn(monkeypatch, lambda: draw_changes(results, column, probabilities, tmp_path / "a.png"))
    assert figure.get_suptitle() == "PGD-10, eps 8/255: the largest rises of the loss"
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 3 * 8 and titles[:2] == ["cat 50%", "dog 50%"]
    assert titles[8] == "dog 45%" and titles[16:19] == ["truly cat", "truly dog", "truly frog"]
