"""Our attacks of advertorch and the package itself, image by image."""

import sys

import pytest
import torch
import torch.autograd.gradcheck  # noqa: F401 - the module, which a function of its name hides
from torch import nn

from tests.compat.originals.packages import original
from tests.compat.problem import assert_same_images, problem
from twins_fast.compat import advertorch as ours

# PyTorch 1.9 took it away; it is imported by attacks that are not ours, and not called here.
sys.modules["torch.autograd.gradcheck"].zero_gradients = None
theirs = original("advertorch.attacks")


def margin(logits, labels):
    return (logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]).sum()


CASES = {
    "as it comes": {},
    "from the image": {"rand_init": False},
    "targeted": {"targeted": True},
    "another loss": {"loss_fn": margin},
    "mean": {"loss_fn": nn.CrossEntropyLoss()},
    "radii by image": {"eps": torch.linspace(0.01, 0.06, 6), "eps_iter": torch.full((6,), 0.01)},
    "another range": {"clip_min": -0.1, "clip_max": 1.2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["LinfPGDAttack", "L2PGDAttack"])
@pytest.mark.parametrize("engine", ["eager", "plan"])
def test_the_same_images(name, case, engine):
    model, images, labels = problem()
    scale = 1 if name == "LinfPGDAttack" else 15
    options = {"eps": 0.04, "eps_iter": 0.015, "nb_iter": 3} | CASES[case]
    options |= {key: scale * options[key] for key in ("eps", "eps_iter")}
    found = []
    for kind, how in ((getattr(theirs, name), {}), (getattr(ours, name), {"engine": engine})):
        torch.manual_seed(1)
        found.append(kind(model, **options, **how).perturb(images, labels))
    assert_same_images(found[1], found[0], images)
    if engine == "eager" and name == "LinfPGDAttack":
        assert (found[1] - found[0]).abs().max() < 1e-6


@pytest.mark.parametrize("ord", [1, 3])
def test_what_is_refused(ord):
    with pytest.raises(NotImplementedError, match=f"ord={ord}"):
        ours.PGDAttack(nn.Identity(), ord=ord)
