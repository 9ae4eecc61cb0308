"""Guards: hooks are seen, random numbers are noticed and restored."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from twins_fast.nn.guards import HOOKS, has_global_hooks, has_hooks, is_untouched, random_numbers_restored

REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("register", [*REGISTER, "register_full_backward_pre_hook"])
def test_hooks_are_seen(register):
    module = nn.ReLU()
    assert not has_hooks(module) and is_untouched(module, nn.ReLU)
    handle = getattr(module, register)(lambda *_: None)
    assert has_hooks(module) and not is_untouched(module, nn.ReLU)
    handle.remove()
    assert not has_hooks(module)


@pytest.mark.parametrize("register", REGISTER)
def test_hooks_on_all_modules_are_seen(register):
    assert not has_global_hooks()
    handle = getattr(nn.modules.module, register.replace("register", "register_module"))(lambda *_: None)
    try:
        assert has_global_hooks()
    finally:
        handle.remove()
    assert not has_global_hooks()


def test_pytorch_has_the_attributes():
    for name in HOOKS:
        assert hasattr(nn.ReLU(), name) and hasattr(nn.modules.module, f"_global{name}")


def test_a_subclass_or_a_replaced_forward_is_not_untouched():
    module = nn.ReLU()
    assert not is_untouched(module, nn.ReLU6) and not is_untouched(None, nn.ReLU)
    module.forward = lambda x: x
    assert not is_untouched(module, nn.ReLU)


DRAWS = {
    "random": random.random,
    "numpy": np.random.normal,  # draws two and holds one back
    "torch": lambda: torch.rand(()).item(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_noticed_and_restored(name):
    with random_numbers_restored() as drawn:
        first = [DRAWS[name]() for _ in range(3)]
    assert drawn == [name]
    with pytest.raises(KeyError), random_numbers_restored() as drawn:
        assert [DRAWS[name]() for _ in range(3)] == first
        raise KeyError
    assert drawn == [name]
    assert [DRAWS[name]() for _ in range(3)] == first


def test_nothing_drawn():
    with random_numbers_restored() as drawn:
        torch.ones(3).sum()
    assert drawn == []
