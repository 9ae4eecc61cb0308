"""Learning rates."""

import pytest

from tests.train.helpers import train
from twins_fast.evaluation import Accuracy
from twins_fast.train import trainer
from twins_fast.train.recipe import Optimizer
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.schedule import learning_rate


def test_learning_rates():
    published = Optimizer()
    rates = [learning_rate(published, step, 10) for step in (0, 299, 300, 499, 500, 599)]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])
    cycle = Optimizer(epochs=10, lr=1.0, schedule="onecycle", warmup=0.3)
    rates = [learning_rate(cycle, step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.02) and rates.index(max(rates)) in (29, 30)
    assert rates[0] < 0.03 and rates[-1] < 0.01


def test_auto_is_halved():
    auto = Optimizer(lr=0.08, schedule="auto")
    assert [learning_rate(auto, 5, 10, halvings) for halvings in (0, 1, 3)] == [0.08, 0.04, 0.01]


def test_auto_halves_when_validation_stops_improving(tmp_path, npz, capsys, monkeypatch):
    robust = iter([0.2, 0.3, 0.3, 0.1, 0.4, 0.0, 0.1, 0.1])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Accuracy(0.5, next(robust, 0.1), 6))
    options = ["--optimizer.schedule", "auto", "--optimizer.patience", "2", "--lr", "0.08", "--epochs", "8"]
    validation = ["--evaluation.choose-on", "validation", "--evaluation.validation-part", "0.25"]
    assert train(tmp_path / "run", npz, *options, *validation) == 0
    rates = {
        line["epoch"]: line["lr"] for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "train"
    }
    assert [rates[epoch] for epoch in range(1, 9)] == [0.08] * 4 + [0.04] * 3 + [0.02]
    assert train(tmp_path / "other", npz, *options) == 2
    assert "schedule 'auto' looks at validation images" in capsys.readouterr().err
