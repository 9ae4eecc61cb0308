"""The head alone, on the features of a body that nothing changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twins_fast import PGD, TrainingStep
from twins_fast.methods import METHODS
from twins_fast.nn.heads import features, head_name, head_of, with_head


@pytest.mark.parametrize("name", ["linear-probe", "adversarial-linear-probe"])
def test_loss_gradient_and_a_body_that_stays(tiny_model, batch, name):
    images, labels = batch
    method, body = METHODS[name](), copy.deepcopy(tiny_model).eval()
    model = method.prepare(tiny_model).train()
    attack = method.attack(model, steps=2)
    torch.manual_seed(0)
    adversarial = images if attack is None else PGD(body, steps=2)(images, labels)
    head = copy.deepcopy(body.fc_downstream).requires_grad_(True)
    expected = F.cross_entropy(head(features(body, adversarial).detach()), labels)
    expected.backward()
    optimizer = torch.optim.SGD(method.parameters(model), 0.1)
    torch.manual_seed(0)
    loss = TrainingStep(model, optimizer, method=method, attack=attack)(images, labels)["loss"]
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model.fc_downstream.weight, head.weight - 0.1 * head.weight.grad)
    torch.testing.assert_close(model.fc_downstream.bias, head.bias - 0.1 * head.bias.grad)
    assert model.training and model.bn1.training
    for name, value in body.state_dict().items():
        assert name.startswith("fc_downstream") or torch.equal(model.state_dict()[name], value), name


class TestHeads:
    def test_a_network_with_another_head_shares_everything_else(self, tiny_model, batch):
        nested = nn.Sequential(nn.Identity(), tiny_model).eval()
        assert head_name(nested) == "1.fc_downstream" and head_of(nested) is tiny_model.fc_downstream
        other = nn.Linear(8, 5)
        changed = with_head(nested, other)
        assert changed(batch[0]).shape == (8, 5) and nested(batch[0]).shape == (8, 3)
        torch.testing.assert_close(changed(batch[0]), other(features(nested, batch[0])))
        assert {*map(id, changed.parameters())} - {*map(id, nested.parameters())} == {*map(id, other.parameters())}

    def test_the_last_linear_layer_is_the_head_of_other_networks(self):
        assert head_name(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))) == "2"
        with pytest.raises(ValueError, match=r"no nn.Linear that could be its head"):
            head_of(nn.Conv2d(3, 4, 1))
