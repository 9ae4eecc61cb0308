"""Faults, threads, copies and odd input leave model and engine usable."""

import copy
import gc
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.attacks.engine.helpers import STEP, assert_untouched, data, small, state_of
from twins_fast import PGD
from twins_fast.attacks.engine import passes
from twins_fast.attacks.engine.program import Program


def test_threads_take_turns():
    model = small()
    attack = PGD(model, engine="plan", random_start=False, steps=3)
    batches = [data(6, seed=seed) for seed in range(4)]
    expected = [attack(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for adversarial, alone in zip(pool.map(lambda batch: attack(*batch), batches * 3), expected * 3, strict=True):
            assert torch.equal(adversarial, alone)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError("boom")])
def test_a_fault_in_the_middle_leaves_the_model_and_the_engine_usable(fault, monkeypatch):
    model = small().train()
    model.conv1.weight.requires_grad_(False)
    x, y = data(4)
    attack = PGD(model, engine="plan", random_start=False)
    good = attack(x, y)
    before = state_of(model)
    calls = []
    real = passes._run

    def failing(steps):
        calls.append(1)
        if len(calls) == 7:
            raise fault
        real(steps)

    monkeypatch.setattr(passes, "_run", failing)
    with pytest.raises(fault if isinstance(fault, type) else type(fault)):
        attack(x, y)
    monkeypatch.undo()
    assert_untouched(model, before)
    assert torch.equal(attack(x, y), good)


def test_out_of_memory_continues_in_smaller_chunks(monkeypatch):
    x, y = data(8)
    model = small()
    good = PGD(model, engine="plan", random_start=False)(x, y)
    real = Program.bound

    def bound(self, rows):
        if rows > 3:
            raise MemoryError
        return real(self, rows)

    monkeypatch.setattr(Program, "bound", bound)
    attack = PGD(model, engine="plan", random_start=False)
    with pytest.warns(UserWarning, match="memory ran out with 8 images at once; continuing with 4"):
        assert torch.equal(attack(x, y), good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it remembers
        assert torch.equal(attack(x, y), good)
    monkeypatch.setattr(Program, "bound", lambda self, rows: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack(x, y)


@pytest.mark.parametrize("kind", ["plan", "eager"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pixels_with_nan_gradients_stay(kind, norm):
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 16, 10)

        def forward(self, x):
            y = x + 0  # one NaN per image: the derivative of 0 * sqrt at zero
            root = (y[:, :1, :1, :1] * 0).sqrt() * 0
            return self.head(torch.flatten(y, 1)) + root.flatten(1)

    torch.manual_seed(0)
    x, y = data(5, 4)
    attack = PGD(Rooted(), engine=kind, norm=norm, steps=2, random_start=False)
    with pytest.warns(UserWarning, match="10 gradients of pixel values were NaN"):
        adversarial = attack(x, y)
    assert attack.nan_gradients == 10
    moved = adversarial != x
    assert not moved[:, 0, 0, 0].any() and moved.flatten(1).sum(1).min() > 40
    assert adversarial.isfinite().all()


def test_labels_beyond_the_classes_are_refused():
    x, _ = data(2)
    with pytest.raises(ValueError, match="class 10, but the model has 10"):
        PGD(small(), engine="plan")(x, torch.tensor([1, 10]))


def test_copies_and_pickles():
    attack = PGD(small(), engine="plan", **STEP)
    x, y = data(2)
    adversarial = attack(x, y)
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert torch.equal(other(x, y), adversarial)


def test_memory_is_flat_over_many_calls():
    attack = PGD(small(), engine="plan", steps=1)
    batches = [data(n) for n in (3, 7, 16)]
    for x, y in batches * 2:
        attack(x, y)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = tensors()
    for _ in range(5):
        for x, y in batches:
            attack(x, y)
    assert tensors() <= before + 4


def test_timed_explanation_covers_every_layer():
    model = small()
    x, y = data(4)
    report = PGD(model).explain(x, y, timed=True)
    assert report.images == 4
    for layer in report.layers:
        assert layer["forward_ms"] > 0 and layer["backward_ms"] > 0 and layer["bytes"] > 0
    text = str(report)
    assert "forward ms" in text and "layers.0.0.conv1" in text
