"""What ``import twins_fast`` brings with it."""

import subprocess
import sys
from pathlib import Path

import pytest

from twins_fast import models

SLOW = {"torchvision", "torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "tyro", "timm"}
ROOT = Path(__file__).parent.parent
ATTACK = """
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
twins_fast.PGD(model, steps=1, engine="eager")(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))
"""


def printed(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize("then", ["", ATTACK])
def test_nothing_slow_but_torch(then):
    code = f"import sys, torch; before = set(sys.modules); import twins_fast; twins_fast.PGD\n{then}"
    brought = set(printed(f"{code}\nprint(*set(sys.modules) - before)"))
    assert "twins_fast.attacks.pgd" in brought
    assert not brought & SLOW


def test_networks_come_when_they_are_asked_for():
    code = "from twins_fast.models import *; print(build_model.__module__, CifarResNet.__module__)"
    assert printed(code) == ["twins_fast.models.registry", "twins_fast.models.resnet"]
    assert set(models.__all__) <= set(dir(models))
    with pytest.raises(AttributeError, match="'twins_fast.models' has no attribute 'resnet51'"):
        models.resnet51  # noqa: B018 - the attribute is what is asked for
