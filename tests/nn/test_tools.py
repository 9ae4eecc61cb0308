"""Two-wing networks in other hands: copies and averages, compilers and exporters, and what walks over batch norms."""

import copy
import io
import pickle

import pytest
import timm
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.nn.test_layers import perturbed
from twins_fast import TwinBatchNorm2d, convert_twin_bn, fuse_twin_bn, revert_twin_bn, wings
from twins_fast.models import CifarResNet
from twins_fast.nn.layers import TwinBatchNormAct2d
from twins_fast.nn.published import MixBatchNorm2d


class Published(CifarResNet):
    """With the published layer, whose wing is an attribute."""

    def __init__(self, **options):
        super().__init__(**options)
        for name, module in [*self.named_modules()]:
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, MixBatchNorm2d(module.num_features))
        self.apply(lambda m: setattr(m, "batch_type", "mix") if isinstance(m, MixBatchNorm2d) else None)


OPTIONS = {"num_classes": 3, "width": 4, "blocks": (1, 1)}
NETWORKS = {
    "plain": lambda: convert_twin_bn(CifarResNet(**OPTIONS)),
    "fused": lambda: fuse_twin_bn(convert_twin_bn(CifarResNet(**OPTIONS))),
    "published": lambda: Published(**OPTIONS),
    "BatchNormAct2d": lambda: convert_twin_bn(
        nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    ),
}


def built(name):
    torch.manual_seed(0)
    return perturbed(NETWORKS[name]())


@pytest.fixture(params=NETWORKS)
def network(request):
    return built(request.param)


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def layers(model):
    return [module for module in model.modules() if isinstance(module, TwinBatchNorm2d)]


def assert_same(found, expected, images):
    """In every mode and wing, running statistics after it included."""
    found, expected = copy.deepcopy(found), copy.deepcopy(expected)
    for training in (True, False):
        torch.testing.assert_close(found.train(training)(images), expected.train(training)(images))
    with wings(found, "frozen"), wings(expected, "frozen"):
        torch.testing.assert_close(found(images), expected(images))
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_layers_are_batch_norms_by_type_and_by_name(network):
    for layer in layers(network):
        assert isinstance(layer, _BatchNorm) and isinstance(layer, nn.BatchNorm2d)
        assert "BatchNorm" in type(layer).__name__ and "BatchNorm" in type(layer.main_bn).__name__
    assert layers(network)


def test_copies(network, images):
    stream = io.BytesIO()
    torch.save(network, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded):
        assert_same(other, network, images)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in network.parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts(name, images):
    network = built(name)
    network(images)
    other = NETWORKS[name]()
    stream = io.BytesIO()
    torch.save(network.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert_same(other, network, images)
    reverted = revert_twin_bn(copy.deepcopy(network))
    ordinary = revert_twin_bn(NETWORKS[name]())
    ordinary.load_state_dict(reverted.state_dict())
    with wings(network, "adaptive"):
        torch.testing.assert_close(ordinary.eval()(images), network.eval()(images))


AVERAGES = {
    "AveragedModel": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "ModelEmaV2": lambda model: timm.utils.ModelEmaV2(model, decay=0.5),
    "ModelEmaV3": lambda model: timm.utils.ModelEmaV3(model, decay=0.5),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_the_weights(network, images, kind):
    average, start = AVERAGES[kind](network), copy.deepcopy(network)
    update = getattr(average, "update_parameters", None) or average.update
    update(network)
    network(images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    update(network)
    inner = average.module
    assert len(layers(inner)) == len(layers(network)) and inner(images).shape == (4, 3)
    for (name, first), last, mean in zip(
        start.state_dict().items(), network.state_dict().values(), inner.state_dict().values(), strict=True
    ):
        if first.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(mean, (first + last) / 2, msg=name)
        if name.endswith(("main_bn.running_mean", "main_bn.running_var")):
            assert torch.equal(mean, first), name


def test_distributed_data_parallel(network, images, tmp_path):
    """One process of one; two share their statistics in tests/ops/test_sync.py."""
    expected = copy.deepcopy(network)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(network)
        for model in (parallel, expected):
            for _ in range(2):
                model.zero_grad()
                model(images).square().sum().backward()
        for own, other in zip(network.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)
        for own, other in zip(network.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(own, other)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["plain", "BatchNormAct2d"])
def test_compiled(images, name, training):
    whole = built(name).train(training)
    network = nn.Sequential(whole.conv1, whole.bn1) if name == "plain" else whole  # a whole one takes long to compile
    expected = copy.deepcopy(network)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for model in (compiled, expected):
        model(images).square().sum().backward()
    torch.testing.assert_close(compiled(images), expected(images))
    for (name, own), other in zip(network.named_parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    for own, other in zip(network.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name, training", [("plain", True), ("published", False), ("BatchNormAct2d", False)])
def test_exported(images, name, training):
    network = built(name).train(training)
    expected = copy.deepcopy(network)(images)
    exported = torch.export.export(network, (images,), strict=False)
    torch.testing.assert_close(exported.module()(images), expected)
    assert exported.state_dict.keys() == network.state_dict().keys()


def test_groups_for_weight_decay(network):
    """By name, as training scripts have it, and by timm: batch norm of either wing is not decayed."""
    owners = {layer for twin in layers(network) for layer in (twin, twin.main_bn)}
    norms = {id(parameter) for layer in owners for parameter in layer.parameters()}
    skipped, decayed = timm.optim.param_groups_weight_decay(network, weight_decay=0.1)
    assert (skipped["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    assert norms <= {id(p) for p in skipped["params"]} and not norms & {id(p) for p in decayed["params"]}
    by_name = {id(p) for name, p in network.named_parameters() if "bn" in name}
    frozen = {id(p) for twin in layers(network) for p in twin.main_bn.parameters()}
    named = {id(p) for name, p in network.named_parameters() if name.split(".")[-2].startswith(("bn", "main_bn"))}
    assert frozen <= by_name <= norms and named <= by_name


def test_traversals_of_timm(images):
    torch.manual_seed(0)
    ordinary = timm.create_model("resnet10t", num_classes=3)
    model = convert_twin_bn(copy.deepcopy(ordinary))
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    matched = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(name for names in matched.values() for name in names) == sorted(
        n for n, _ in model.named_parameters()
    )
    expected = model.eval()(images)
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    torch.testing.assert_close(frozen(images), expected)
    assert not layers(frozen)
    timm.utils.freeze(model, ["layer1"], include_bn_running_stats=False)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert layers(model.layer1) and all(p.requires_grad for p in model.layer2.parameters())
    timm.utils.unfreeze(model, ["layer1"], include_bn_running_stats=False)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(timm.utils.reparameterize_model(model)(images), expected)


def test_traversals_of_torch_ao(images):
    quantization = pytest.importorskip("torch.ao.quantization", reason="PyTorch announces that it goes")
    model = built("plain").eval()
    with wings(model, "adaptive"):
        expected = model(images)
    conv, norm = model.conv1, model.bn1
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(images), norm(conv(images)), rtol=1e-4, atol=1e-4)
    with pytest.raises((NotImplementedError, KeyError, TypeError, AssertionError)):  # loud: it knows exact types only
        quantization.fuse_modules(copy.deepcopy(model), [["conv1", "bn1"]])
    observed = copy.deepcopy(model)
    observed.qconfig = quantization.default_qconfig
    observed = quantization.prepare(observed)
    torch.testing.assert_close(observed(images), expected)  # observers change nothing
    assert len(layers(observed)) == len(layers(model)) and hasattr(observed.conv1, "activation_post_process")
    ordinary = revert_twin_bn(copy.deepcopy(model))
    fused = quantization.fuse_modules(ordinary, [["conv1", "bn1"]])
    torch.testing.assert_close(fused(images), expected, rtol=1e-3, atol=1e-3)


def test_activation_layers_keep_their_own_class():
    assert type(built("BatchNormAct2d")[1]) is TwinBatchNormAct2d
