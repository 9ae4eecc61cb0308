"""The moving average of the weights."""

import copy

import torch

from twins_fast.train.average import WeightAverage


def test_the_average_of_a_few_steps(tiny_model):
    average, weight = WeightAverage(tiny_model, 0.3), tiny_model.conv1.weight
    expected = weight.detach().clone()
    for step in (1, 2, 3):
        with torch.no_grad():
            weight.add_(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        average.update(step)
    own, statistics = copy.deepcopy(tiny_model.state_dict()), tiny_model.bn1.running_mean
    with average.in_place():
        torch.testing.assert_close(tiny_model.conv1.weight.detach(), expected)
        assert tiny_model.bn1.running_mean is statistics
    assert all(torch.equal(value, own[name]) for name, value in tiny_model.state_dict().items())
    average.take()
    with average.in_place():
        assert torch.equal(tiny_model.conv1.weight, own["conv1.weight"])
