"""Two-wing layers: wings, conversion, state dicts."""

import copy
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from twins_fast import TwinBatchNorm2d, convert_twin_bn, ops, revert_twin_bn, wings
from twins_fast.ops import backend


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
    layer, x = twin(affine=False), torch.randn(4, 5, 2, 2)
    assert not list(layer.parameters())
    expected, _, _ = by_hand(layer, x, 2)
    assert torch.equal(layer(x), expected)


def recorded_calls(monkeypatch):
    """(whether with a residual, relu) of every call of the op from here on."""
    calls = []

    def recording(*args, **kwargs):
        bound = inspect.signature(ops.twin_batch_norm).bind(*args, **kwargs).arguments
        calls.append((bound.get("residual") is not None, bound.get("relu", False)))
        return ops.twin_batch_norm(*args, **kwargs)

    monkeypatch.setattr("twins_fast.nn.layers.twin_batch_norm", recording)
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wing", ["mix", "adaptive", "frozen"])
@pytest.mark.parametrize(("with_residual", "relu"), [(True, False), (False, True), (True, True)])
def test_residual_and_relu_are_part_of_one_call(monkeypatch, training, wing, with_residual, relu):
    layer, x = twin().train(training), torch.randn(6, 5, 3, 4)
    other, residual = copy.deepcopy(layer), torch.randn(6, 5, 3, 4) if with_residual else None
    with wings(layer, wing), wings(other, wing):
        expected = other(x)
        expected = expected if residual is None else expected + residual
        calls = recorded_calls(monkeypatch)
        got = layer(x, residual, relu)
    assert torch.equal(got, expected.relu() if relu else expected)
    if training or wing != "mix":  # two sets of running statistics are two batch norms
        assert calls == [(with_residual, relu)]
    for name, value in other.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_a_residual_that_the_op_does_not_take(monkeypatch):
    layer, x = twin().eval(), torch.randn(6, 5, 3, 4)
    for residual in (torch.randn(5, 1, 1), torch.randn(6, 5, 3, 4).double(), 2.0):
        assert torch.equal(layer(x, residual, True), (layer(x) + residual).relu())
    assert layer(x[:0], x[:0], True).shape == (0, 5, 3, 4)


ACTIVATIONS = {  # drop, act, and whether one call of the op does it
    "ReLU": (nn.Identity(), nn.ReLU(inplace=True), True),
    "Identity": (nn.Identity(), nn.Identity(), True),
    "dropout of nothing": (nn.Dropout2d(0.0), nn.ReLU(), True),
    "dropout": (nn.Dropout(0.5), nn.ReLU(), False),
    "SiLU": (nn.Identity(), nn.SiLU(), False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_timm_layers(monkeypatch, name, training):
    plain = perturbed(timm.layers.BatchNormAct2d(5)).train(training)
    plain.drop, plain.act, fused = ACTIVATIONS[name]
    layer, x = convert_twin_bn(copy.deepcopy(plain)), torch.randn(6, 5, 3, 4)
    assert layer.state_dict().keys() == twin().state_dict().keys()
    with wings(layer, "adaptive"):
        torch.manual_seed(0)
        expected = plain(x)
        calls = recorded_calls(monkeypatch)
        torch.manual_seed(0)
        assert torch.equal(layer(x), expected)
        assert layer.fuses_act() == (fused or name == "dropout" and not training)
        if fused and type(plain.act) is nn.ReLU:
            assert calls == [(False, True)]
        layer.eval(), plain.eval()
        residual = torch.randn(6, 5, 3, 4)
        bare = F.batch_norm(x, plain.running_mean, plain.running_var, plain.weight, plain.bias)
        assert torch.equal(layer(x, residual), plain.act(bare + residual))


def test_hooks_on_an_activation_run():
    layer, seen = convert_twin_bn(timm.layers.BatchNormAct2d(5)), []
    layer.act.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(4, 5, 2, 2))
    assert seen == [1] and not layer.fuses_act()


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
    assert convert_twin_bn(model)[0] is layer and type(layer.main_bn) is nn.BatchNorm2d
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
    with pytest.raises(ValueError, match="cannot convert 0: .*running statistics"):
        convert_twin_bn(nn.Sequential(nn.SyncBatchNorm(4, track_running_stats=False)))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        convert_twin_bn(nn.Conv2d(1, 1, 1))


def test_conversion_refuses_before_it_changes_anything():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="cannot convert 1"):
        convert_twin_bn(model)
    assert type(model[0]) is nn.BatchNorm2d

    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="Odd"):
        convert_twin_bn(nn.Sequential(Odd(4)))


def test_state_dict_has_the_published_names():
    names = set(TwinBatchNorm2d(3).state_dict())
    own = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert names == own | {f"main_bn.{name}" for name in own}
