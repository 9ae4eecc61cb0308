"""The picture of a run."""

import pytest
from matplotlib import pyplot as plt

from twins_fast.train.plots import draw_curves


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
