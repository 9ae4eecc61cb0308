"""Learning rates."""

import pytest

from twins_fast.train.recipe import Optimizer
from twins_fast.train.schedule import learning_rate


def test_learning_rates():
    published = Optimizer()
    rates = [learning_rate(published, step, 10) for step in (0, 299, 300, 499, 500, 599)]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])
    cycle = Optimizer(epochs=10, lr=1.0, schedule="onecycle", warmup=0.3)
    rates = [learning_rate(cycle, step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.02) and rates.index(max(rates)) in (29, 30)
    assert rates[0] < 0.03 and rates[-1] < 0.01
