"""Functions of images are attacked as the networks in them are."""

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.attacks.engine.helpers import STEP, assert_same_step, data, net, program_of
from twins_fast import PGD
from twins_fast.attacks.engine.reads import LONGEST, Reads

STD = 0.5
NUMBERS = np.array([0.5, 0.4, 0.3], dtype=np.float32)


def network():
    return net(lambda m, x: m.top(m.c2(m.c1(x).relu()).relu()))


NET = network()


def by_a_global(x):
    return NET((x - 0.4) / STD)


def with_an_array(x):
    return NET(x - torch.from_numpy(NUMBERS).view(3, 1, 1))


def scaled(model, x, scale):
    return model(x) * scale


class Predictor:
    def __init__(self):
        self.model, self.mean, self.history = NET, torch.full((3, 1, 1), 0.4), []

    def normalised(self, x):
        return x - self.mean

    def __call__(self, x):
        return self.model(self.normalised(x))

    def predict(self, x):
        return self(x) * 2


def ensemble():
    other, shared = copy.deepcopy(NET), [NET]
    return lambda x: shared[0](x) + other(x)


KINDS = {
    "global": lambda: by_a_global,
    "array": lambda: with_an_array,
    "lambda": lambda: lambda x, model=NET: model(x),
    "partial": lambda: functools.partial(scaled, NET, scale=-1.5),
    "method": lambda: NET.forward,
    "object": Predictor,
    "method of an object": lambda: Predictor().predict,
    "ensemble": ensemble,
    "dictionary": lambda: (lambda nets: lambda x: nets["one"](x))({"one": NET}),
    "namespace": lambda: (lambda space: lambda x: space.inner.model(x))(
        SimpleNamespace(inner=SimpleNamespace(model=NET))
    ),
}


@pytest.fixture(autouse=True)
def unchanged():
    before = copy.deepcopy(NET.state_dict())
    yield
    NET.load_state_dict(before)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_in_functions_are_planned_and_looked_at(kind):
    function, (x, y) = KINDS[kind](), data(4, 8)
    NET.train()
    attack = PGD(function, engine="plan", **STEP)
    assert NET in list(attack.model.networks)
    before = attack(x, y)
    assert NET.training and NET.c2.training
    assert_same_step(attack.model, x, y)
    with torch.no_grad():
        NET.c1.weight *= -1
    assert not torch.equal(attack(x, y), before)
    assert_same_step(attack.model, x, y)


def test_numbers_and_arrays_of_globals_are_looked_at(monkeypatch):
    x, y = data(4, 8)
    for function, name, value in ((by_a_global, "STD", 0.25), (with_an_array, "NUMBERS", NUMBERS[::-1].copy())):
        attack = PGD(lambda x, function=function: function(x * x), engine="plan", **STEP)
        first = program_of(attack, x)
        assert program_of(attack, x) is first
        monkeypatch.setitem(globals(), name, value)
        assert program_of(attack, x) is not first
        assert_same_step(attack.model, x, y)
    second = program_of(attack, x)
    NUMBERS[0] += 0.25
    assert program_of(attack, x) is not second
    NUMBERS[0] -= 0.25


def test_another_network_of_a_function(monkeypatch):
    x, y = data(4, 8)
    attack = PGD(by_a_global, engine="plan", **STEP)
    before = attack(x, y)
    other = copy.deepcopy(NET)
    other.c1.weight.data *= -1
    monkeypatch.setitem(globals(), "NET", other.train())
    assert not torch.equal(attack(x, y), before) and other.training
    assert list(attack.model.networks) == [other]
    assert_same_step(attack.model, x, y)


def test_attacks_on_a_function_share_its_plans_and_plans_go_with_it():
    model, x = network(), data(2, 8)[0]
    function = (lambda net: lambda x: net(x))(model)
    program = program_of(PGD(function), x)
    assert program_of(PGD(function), x) is program
    program, owner = weakref.ref(program), weakref.ref(model)
    attack = copy.deepcopy(PGD(function))
    del function, model
    assert attack.explain(x).engine == "plan" and owner() is not None
    del attack
    gc.collect()
    assert program() is None and owner() is None


class Calling(nn.Module):
    def forward(self, x):
        return NET(x)


@pytest.mark.parametrize("make", [Calling, lambda: lambda x: globals()["N" + "ET"](x)], ids=["module", "function"])
def test_a_network_that_is_not_found_means_eager(make):
    x, y = data(4, 8)
    NET.eval()
    attack = PGD(make(), **STEP)
    assert "it calls a Forwarded that is no part of it" in attack.explain(x).reason
    assert torch.equal(attack(x, y), PGD(NET, engine="eager", **STEP)(x, y))


def test_what_is_no_function():
    with pytest.raises(TypeError, match="got SimpleNamespace"):
        PGD(SimpleNamespace(ema=NET))


def test_what_functions_read():
    big, history = list(range(LONGEST + 1)), []
    scope = SimpleNamespace(a=SimpleNamespace(b=3), unread=4)

    def inner(x):
        history.append(x)
        return x + scope.a.b + big[0]

    reads = Reads()
    reads.follow(functools.partial(lambda x, factor: [inner(i) * factor for i in x], factor=2.5))
    found = {read.name: read.value for read in reads}
    assert found["factor"] == 2.5 and found["b"] == 3 and found["inner"] is inner and "unread" not in found
    assert all(read.holds() for read in reads)
    scope.a.b = 4
    assert [read.name for read in reads if not read.holds()] == ["b"]


def test_reading_comes_to_an_end():
    ring, chain = [], SimpleNamespace(next=None)
    ring.append(ring)
    for _ in range(3000):
        chain = SimpleNamespace(next=chain)
    reads = Reads()
    reads.follow(lambda x: x + len(ring) + chain.next.next)
    assert len(reads) > 3000 and reads.modules() == []
