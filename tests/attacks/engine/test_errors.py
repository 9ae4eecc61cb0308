"""With ``engine="auto"`` an error in the engine never reaches the user: the attack is the eager one, and says why."""

import random
import warnings

import numpy as np
import pytest
import torch

from tests.attacks.engine.helpers import Doubled, assert_untouched, data, few_at_once, net, program_of, state_of
from twins_fast import PGD
from twins_fast.attacks.engine import cache, passes, patterns, program, schedule, watch
from twins_fast.attacks.engine.executors.torch import TorchExecutor

STAGES = {
    "capture": (cache, "capture"),
    "patterns": (patterns.PATTERNS, "conv2d"),
    "stages": (schedule, "Fuser"),
    "schedule": (cache, "build"),
    "executor": (cache, "executor_for"),
    "program": (program.Program, "__init__"),
    "fold": (program, "Fold"),
    "memory": (program, "place"),
    "check": (cache, "difference"),
    "bind": (program.Program, "_bind"),
    "run": (program.Program, "graphed"),
}


def failing(monkeypatch, where, name, error):
    """Have a function raise, and list its calls."""
    calls = []

    def fails(*arguments, **keywords):
        calls.append(name)
        raise error

    (monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr)(where, name, fails)
    return calls


def model_in_odd_modes():
    model = net(lambda m, x: m.top(m.c2(m.c1(x).relu()).relu())).train()
    model.c2.eval()
    model.c1.weight.requires_grad_(False)
    return model


def seeded(attack, x, y):
    """The attacked images, and the states of all random numbers after it."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    return attack(x, y), (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())


def caught(attack, x, y):
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        result = seeded(attack, x, y)
    return result, [str(message.message) for message in messages]


def assert_as_eager(model, attack, x, y):
    """Returns the warnings."""
    before = state_of(model)
    (expected, drawn), _ = caught(PGD(model, engine="eager"), x, y)
    (adversarial, drawn_too), messages = caught(attack, x, y)
    assert torch.equal(adversarial, expected) and drawn_too == drawn
    assert_untouched(model, before)
    return messages


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_at_any_stage_means_eager(stage, monkeypatch):
    model, (x, y) = model_in_odd_modes(), data(3, 8)
    calls = failing(monkeypatch, *STAGES[stage], ArithmeticError("boom\nand more"))
    attack = PGD(model)
    (message,) = assert_as_eager(model, attack, x, y)
    assert "ArithmeticError: boom;" in message and "eager" in message
    report = attack.explain(x)
    assert report.reason.endswith("failed: ArithmeticError: boom") and str(report) == f"eager: {report.reason}"
    assert assert_as_eager(model, attack, x, y) == [] and len(calls) == 1
    attack.forget()
    assert len(assert_as_eager(model, attack, x, y)) == 1 and len(calls) == 2
    with pytest.raises((RuntimeError, ArithmeticError), match="boom"):
        PGD(model, engine="plan")(x, y)
    monkeypatch.undo()
    attack.forget()
    assert attack.explain(x).engine == "plan"


@pytest.mark.parametrize("name", ["obstacle", "fingerprint"])
def test_a_model_that_cannot_be_examined_runs_in_eager(name, monkeypatch):
    model, (x, y) = model_in_odd_modes(), data(3, 8)
    failing(monkeypatch, cache if name == "obstacle" else watch, name, ArithmeticError("boom"))
    attack = PGD(model)
    assert len(assert_as_eager(model, attack, x, y)) == 1 and "boom" in attack.explain(x).reason
    assert assert_as_eager(model, attack, x, y) == []


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_error_in_the_middle_of_a_run_starts_anew(norm, monkeypatch):
    """Some images have been attacked by then, and others have taken some steps."""
    few_at_once(monkeypatch)  # one image at a time
    model, (x, y) = model_in_odd_modes(), data(3, 8)
    options = {"norm": norm, "steps": 3, "random_start": False}
    attack = PGD(model, **options)
    attack(x, y)
    real, calls = passes._run, []

    def sometimes(steps):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("boom")
        real(steps)

    monkeypatch.setattr(passes, "_run", sometimes)
    before, clean = state_of(model), x.clone()
    with pytest.warns(UserWarning, match="the plan failed: RuntimeError: boom; the model was attacked in eager mode"):
        adversarial = attack(x, y)
    assert torch.equal(x, clean)
    assert torch.equal(adversarial, PGD(model, engine="eager", **options)(x, y))
    assert_untouched(model, before)
    assert attack.explain(x).reason == "the plan failed: RuntimeError: boom"


def test_when_memory_runs_out_only_this_attack_is_eager(monkeypatch):
    model, (x, y) = model_in_odd_modes(), data(1, 8)
    attack = PGD(model)
    program_of(attack, x)
    with monkeypatch.context() as patched:
        failing(patched, program.Program, "bound", MemoryError())
        (message,) = assert_as_eager(model, attack, x, y)
    assert "the plan failed: MemoryError: no message" in message
    assert attack.explain(x).engine == "plan"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("stage", ["capture", "check", "run"])
def test_interruptions_come_through(stage, error, monkeypatch):
    model, (x, y) = model_in_odd_modes(), data(3, 8)
    before, attack = state_of(model), PGD(model)
    failing(monkeypatch, *STAGES[stage], error)
    with pytest.raises(error):
        attack(x, y)
    assert_untouched(model, before)
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(cache, "difference", lambda *arguments: calls.append(1) or "")
    assert attack.explain(x).engine == "plan" and calls


def test_an_interrupted_check_is_made_again(monkeypatch):
    model, (x, y) = model_in_odd_modes(), data(3, 8)
    attack = PGD(model)
    failing(monkeypatch, TorchExecutor, "convolution", KeyboardInterrupt)  # the check runs by PyTorch
    with pytest.raises(KeyboardInterrupt):
        attack(x, y)
    monkeypatch.undo()
    assert program_of(attack, x).verified == {3}


class Noisy(Doubled):
    def forward(self, x):
        return self.body(x + (0 if torch.compiler.is_compiling() else torch.rand(len(x), 1, 8, 8)))


def test_a_check_that_draws_random_numbers_puts_them_back():
    model, (x, y) = Noisy(model_in_odd_modes()), data(3, 8)
    attack = PGD(model)
    (message,) = assert_as_eager(model, attack, x, y)
    assert message.startswith("the plan's logits or gradients are not the model's;")
    assert assert_as_eager(model, attack, x, y) == []


class Failing(Doubled):
    """Fails on more images than one, but not while it is captured."""

    def forward(self, x):
        if not torch.compiler.is_compiling() and len(x) > 1:
            raise ZeroDivisionError("mine")
        return self.body(x)


def never(m, x):
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize("make", [lambda: net(never), lambda: Failing(model_in_odd_modes())])
def test_an_error_of_the_model_is_the_users(make):
    model, (x, y) = make(), data(3, 8)
    attack, before = PGD(model), state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="^mine$"):
                attack(x, y)
        assert "ZeroDivisionError: mine" in attack._program(x)
    assert_untouched(model, before)


def test_an_error_of_the_loss_is_the_users_and_the_plan_stays(monkeypatch):
    model, (x, y) = net(lambda m, x: m.top(m.c1(x).relu())[:, :2]), data(3, 8, classes=2)
    attack = PGD(model, loss="dlr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="at least 3 classes"):
            attack(x, y)
    assert attack.explain(x).engine == "plan"
