"""The robustness library with all that it imports, as docs/drop-in.md has it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.attacks.engine.helpers import lively
from tests.compat.originals.packages import original
from tests.compat.problem import assert_same_images
from twins_fast import convert_twin_bn
from twins_fast.compat import robustness as ours

model_utils, resnet = original("robustness.model_utils"), original("robustness.cifar_models.resnet")


@pytest.mark.parametrize("wings", [1, 2])
@pytest.mark.parametrize("constraint, eps", [("inf", 0.02), ("2", 0.5)])
def test_a_model_that_it_made(monkeypatch, constraint, eps, wings):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)  # which the library calls, GPU or not
    monkeypatch.setattr(nn.Module, "cuda", lambda self, *_: self)
    torch.manual_seed(0)
    network = lively(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], wm=1 / 8))
    dataset = SimpleNamespace(mean=torch.tensor([0.45, 0.4, 0.5]), std=torch.tensor([0.2, 0.25, 0.3]))
    model, _ = model_utils.make_and_restore_model(arch=network if wings == 1 else convert_twin_bn(network),
                                                  dataset=dataset)  # fmt: skip
    model.eval()
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6)
    options = {"make_adv": True, "constraint": constraint, "eps": eps, "step_size": eps / 4, "iterations": 5}
    logits, expected = model(images, labels, **options)
    model = ours.accelerate(model, engine="plan")
    found_logits, found = model(images, labels, **options)
    assert_same_images(found, expected, images)
    torch.testing.assert_close(found_logits, logits, rtol=0.02, atol=0.02)
