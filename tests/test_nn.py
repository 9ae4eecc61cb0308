"""Two-wing layers: wings, conversion, state dicts."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from twins_fast import TwinBatchNorm2d, backend, convert_twin_bn, revert_twin_bn, wings


@pytest.fixture(autouse=True)
def plain_backend():
    with backend.use_backend("torch"):
        yield


def perturbed(model):
    """Make every batch norm's entries distinct, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(3)
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point() and value.dim() == 1:
            value.data = torch.rand(value.shape, generator=generator) + 0.5
    return model


def twin(channels=5, **options):
    return perturbed(TwinBatchNorm2d(channels, **options))


def by_hand(layer, x, split, training=True):
    frozen = layer.main_bn
    top = F.batch_norm(x[:split], frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias, eps=layer.eps)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    bottom = F.batch_norm(x[split:], mean, var, layer.weight, layer.bias, training, layer.momentum or 0.0, layer.eps)
    return torch.cat([top, bottom]), mean, var


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_training_mixes_the_wings_and_updates_only_the_adaptive_one(rows):
    layer, x = twin(), torch.randn(rows, 5, 3, 4)
    frozen_before = copy.deepcopy(layer.main_bn.state_dict())
    expected, mean, var = by_hand(layer, x, rows // 2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 1 and layer.main_bn.num_batches_tracked == 1
    for name in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(layer.main_bn.state_dict()[name], frozen_before[name])


def test_eval_is_the_adaptive_wing():
    layer, x = twin().eval(), torch.randn(4, 5, 3, 4)
    expected, _, _ = by_hand(layer, x, 0, training=False)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("wing", "split"), [("mix", 3), ("adaptive", 0), ("frozen", 6)])
def test_wings_chooses_and_puts_back(wing, split, training):
    layer, x = twin().train(training), torch.randn(6, 5, 3, 4)
    expected, _, _ = (
        by_hand(layer, x, split, training) if split < 6 else (by_hand(layer, torch.cat([x, x]), 6)[0][:6], 0, 0)
    )
    with wings(layer, wing):
        assert layer.wing == wing
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert layer.wing is None


def test_wings_puts_back_after_an_error_and_refuses_nonsense():
    layer = twin()
    with pytest.raises(RuntimeError), wings(layer, "frozen"):
        raise RuntimeError
    assert layer.wing is None
    with pytest.raises(ValueError, match="'both'"), wings(layer, "both"):
        pass
    with pytest.raises(ValueError, match="no two-wing"), wings(nn.Conv2d(1, 1, 1), "mix"):
        pass


def test_cumulative_average_without_momentum():
    layer = twin(momentum=None)
    plain = nn.BatchNorm2d(5, momentum=None)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("main_bn")})
    for _ in range(3):
        x = torch.randn(6, 5, 2, 2)
        layer(x), plain(x[3:])
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_too_small_a_batch_is_a_clear_error_and_writes_nothing():
    layer = twin()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        layer(torch.randn(1, 5, 1, 1))
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        layer(torch.randn(2, 5, 1, 1))
    for name in ("running_mean", "running_var", "num_batches_tracked", "main_bn.num_batches_tracked"):
        assert torch.equal(layer.state_dict()[name], before[name]), name


def test_eval_without_running_statistics_is_a_clear_error():
    with pytest.raises(ValueError, match="track_running_stats"):
        TwinBatchNorm2d(5, track_running_stats=False).eval()(torch.randn(4, 5, 2, 2))


def test_without_affine():
    layer = TwinBatchNorm2d(5, affine=False)
    assert not list(layer.parameters())
    assert layer(torch.randn(4, 5, 2, 2)).shape == (4, 5, 2, 2)


NETWORKS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(),
    "timm resnet10t": lambda: timm.create_model("resnet10t"),
    "timm BatchNormAct2d": lambda: timm.create_model("efficientnet_lite0"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_conversion_keeps_evaluation_and_reverts(name):
    model = perturbed(NETWORKS[name]()).eval()
    before, x = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 64, 64)
    expected = model(x)
    parameters = {id(parameter) for parameter in model.parameters()}

    convert_twin_bn(model)
    assert not any(type(module) is nn.BatchNorm2d for n, module in model.named_modules() if not n.endswith("main_bn"))
    assert parameters < {id(parameter) for parameter in model.parameters()}
    assert torch.equal(model(x), expected)
    with wings(model, "frozen"):
        assert torch.equal(model(x), expected)
    model.train()(torch.rand(4, 3, 64, 64)).sum().backward()

    reverted = revert_twin_bn(model)
    assert reverted.state_dict().keys() == before.keys()
    assert not any(isinstance(module, TwinBatchNorm2d) for module in reverted.modules())
    types = [type(module) for module in reverted.modules()]
    assert types == [type(module) for module in NETWORKS[name]().modules()]


def test_conversion_keeps_options_modes_and_shared_layers():
    shared = nn.BatchNorm2d(4, eps=1e-3, momentum=0.02).eval()
    shared.weight.requires_grad_(False)
    model = convert_twin_bn(nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared))
    assert model[0] is model[2]
    layer = model[0]
    assert (layer.eps, layer.momentum, layer.main_bn.eps) == (1e-3, 0.02, 1e-3)
    assert not layer.training and not layer.main_bn.training
    assert not layer.weight.requires_grad and not layer.main_bn.weight.requires_grad and layer.bias.requires_grad
    assert convert_twin_bn(model)[0] is layer
    assert isinstance(convert_twin_bn(nn.BatchNorm2d(2)), TwinBatchNorm2d)


def test_statistics_that_were_switched_off_stay_as_they_are():
    plain = perturbed(nn.BatchNorm2d(4))
    plain.track_running_stats = False
    before, x = plain.running_mean.clone(), torch.randn(6, 4, 3, 3)
    layer = convert_twin_bn(copy.deepcopy(plain))
    torch.testing.assert_close(layer(x)[3:], plain(x[3:]), rtol=0, atol=0)
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked == 0
    plain.num_batches_tracked = None  # as in checkpoints of old PyTorch releases
    convert_twin_bn(plain)(x)


def test_conversion_refuses_what_it_would_lose_or_miss():
    hooked = nn.Sequential(nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot convert 0: it has hooks"):
        convert_twin_bn(hooked)
    with pytest.raises(ValueError, match="cannot convert 0: .*SyncBatchNorm"):
        convert_twin_bn(nn.Sequential(nn.SyncBatchNorm(4)))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        convert_twin_bn(nn.Conv2d(1, 1, 1))


def test_conversion_refuses_before_it_changes_anything():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="cannot convert 1"):
        convert_twin_bn(model)
    assert type(model[0]) is nn.BatchNorm2d

    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Odd"):
        convert_twin_bn(nn.Sequential(Odd(4)))


def test_state_dict_has_the_published_names():
    names = set(TwinBatchNorm2d(3).state_dict())
    own = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert names == own | {f"main_bn.{name}" for name in own}
