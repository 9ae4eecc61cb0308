"""Fused networks: the same results as before, and nothing fused that cannot be."""

import copy
import io
import pickle
import random
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d, create_conv2d
from torch import fx, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from twins_fast import PGD, TwinBatchNorm2d, convert_twin_bn, fuse_twin_bn, fusion_report, revert_twin_bn, wings
from twins_fast.models import CifarResNet, build_model
from twins_fast.nn.wings import is_twin
from twins_fast.ops import backend, native

BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(native._C is None, reason="no compiled module")),
]


def timm_resnet(**options):
    return timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (1, 1, 1, 1), channels=(8, 8, 8, 16), num_classes=3, stem_width=8, **options
    )


def timm_resnetv2(**options):
    return timm.models.resnetv2.ResNetV2(
        (1, 1), (32, 64), num_classes=3, stem_chs=8, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, **options
    )


@pytest.fixture(autouse=True)
def plain_backend():
    with backend.use_backend("torch"):
        yield


NETWORKS = {  # builder, and how many layers are fused how
    "torchvision BasicBlock": (
        lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3),
        {"relu": 5, "add+relu": 4, "": 3},
    ),
    "torchvision Bottleneck": (
        lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3),
        {"relu": 9, "add+relu": 4, "": 4},
    ),
    "torchvision ResNeXt": (
        lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, groups=32, width_per_group=4),
        {"relu": 9, "add+relu": 4, "": 4},
    ),
    "torchvision DenseNet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=3),
        {"relu": 10, "": 1},
    ),
    "torchvision VGG": (
        lambda: nn.Sequential(
            torchvision.models.vgg.make_layers([8, "M", 16, "M"], True), nn.Flatten(), nn.LazyLinear(3)
        ),
        {"relu": 2},
    ),
    "torchvision MobileNetV2": (
        lambda: torchvision.models.MobileNetV2(3, width_mult=0.25, dropout=0.0),
        {"": 52},
    ),
    "timm ResNet": (lambda: timm_resnet(), {"relu": 9, "add+relu": 4, "": 4}),
    "timm ResNet-D": (lambda: timm_resnet(stem_type="deep", avg_down=True), {"relu": 11, "add+relu": 4, "": 4}),
    "timm ResNet SE": (lambda: timm_resnet(block_args={"attn_layer": "se"}), {"relu": 9, "": 8}),
    "timm ResNetV2": (lambda: timm_resnetv2(), {"relu": 7}),
    "timm ResNetV2 not preactivated": (lambda: timm_resnetv2(preact=False), {"relu": 5, "add+relu": 2, "": 2}),
    "timm EfficientNet": (lambda: timm.create_model("efficientnet_b0", num_classes=3), {"add": 9, "": 40}),
    "CifarResNet": (
        lambda: CifarResNet(3, width=8, blocks=(1, 1), block="bottleneck"),
        {"relu": 5, "add+relu": 2, "": 2},
    ),
    "resnet18 of the recipes": (lambda: build_model("resnet18", 3), {"relu": 9, "add+relu": 8, "": 3}),
}


def takes_a_proxy_for_a_list():
    try:
        fx.symbolic_trace(lambda tensors: torch.cat(tensors))
    except TypeError:
        return False
    return True


of_lists = pytest.mark.skipif(not takes_a_proxy_for_a_list(), reason="PyTorch 2.6 cannot trace lists of tensors")
EACH = [pytest.param(name, marks=of_lists if "DenseNet" in name else ()) for name in NETWORKS]


def build(name):
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    model(torch.rand(2, 3, 32, 32))  # lazy layers
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.2
    return convert_twin_bn(model)


def results(model, x):
    """Output, gradients and buffers of one pass."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    entries = {"output": y.detach(), "input gradient": x.grad}
    entries |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return entries | {name: b.clone() for name, b in model.named_buffers()}


def check_same(got, wanted, exact):
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        if want is None or exact or not want.is_floating_point():
            assert got[name] is want is None or torch.equal(got[name], want), name
        else:
            assert (got[name] - want).norm() <= 1e-3 * want.norm() + 1e-6, name


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("name", EACH)
def test_same_results(name, backend_name):
    plain = build(name)
    fused = fuse_twin_bn(copy.deepcopy(plain))
    assert Counter(row.fused for row in fusion_report(fused)) == NETWORKS[name][1]
    assert all(row.fused or row.why for row in fusion_report(fused))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with backend.use_backend(backend_name):
        for training in (True, False):
            for wing in ("mix", "adaptive", "frozen"):
                first, second = (copy.deepcopy(model).train(training) for model in (plain, fused))
                with wings(first, wing), wings(second, wing):
                    check_same(results(second, x), results(first, x), exact=backend_name == "torch")


@pytest.mark.parametrize(
    ("build_network", "counts"),
    [
        (lambda: torchvision.models.resnet50(), {"relu": 33, "add+relu": 16, "": 4}),
        pytest.param(lambda: torchvision.models.densenet121(), {"relu": 120, "": 1}, marks=of_lists),
        (lambda: timm.create_model("resnet26"), {"relu": 17, "add+relu": 8, "": 4}),
    ],
)
def test_counts_of_whole_networks(build_network, counts):
    with torch.device("meta"):
        model = build_network()
    rows = fusion_report(fuse_twin_bn(convert_twin_bn(model)))
    assert Counter(row.fused for row in rows) == counts
    assert {row.why for row in rows if not row.fused} == {"Sequential returns its result"}


@pytest.mark.parametrize("name", EACH)
def test_each_fused_layer_is_one_call(monkeypatch, name):
    calls = Counter()
    forward = TwinBatchNorm2d.forward

    def recording(self, x, residual=None, relu=False):
        calls["+".join(["add"] * (residual is not None) + ["relu"] * relu)] += 1
        return forward(self, x, residual, relu)

    model = fuse_twin_bn(build(name))
    monkeypatch.setattr(TwinBatchNorm2d, "forward", recording)
    model(torch.rand(4, 3, 32, 32))
    assert calls == NETWORKS[name][1]


def test_parts_of_a_fused_network_do_what_they_did():
    plain = build("timm ResNet").eval()
    fused, x = fuse_twin_bn(copy.deepcopy(plain)), torch.rand(2, 3, 32, 32)
    assert torch.equal(fused.forward_features(x), plain.forward_features(x))
    last = "layer4.0.bn3"
    features = torch.randn(2, 64, 4, 4)
    assert torch.equal(fused.get_submodule(last)(features), plain.get_submodule(last)(features))


class Block(nn.Module):
    """conv, batch norm, ``follow``."""

    def __init__(self, follow=None, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = TwinBatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.follow = follow
        self.flag = False

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def block(forward, **members):
    block = type("Block", (Block,), {"forward": forward})()
    for name, value in members.items():
        setattr(block, name, value)
    return block


def fused_as(model):
    (row,) = fusion_report(fuse_twin_bn(model))
    return row.fused


def why_left(model):
    kind = type(model)
    (row,) = fusion_report(fuse_twin_bn(model))
    assert row.fused == "" and type(model) is kind
    return row.why


SPELLINGS = {
    "relu": [
        lambda self, x: self.relu(self.bn(self.conv(x))),
        lambda self, x: F.relu(self.bn(self.conv(x)), inplace=True),
        lambda self, x: torch.relu(self.bn(x)),
        lambda self, x: self.bn(x).relu_(),
    ],
    "add": [lambda self, x: self.bn(self.conv(x)) + x, lambda self, x: x + self.bn(x)],
    "add+relu": [
        lambda self, x: self.relu(self.bn(self.conv(x)) + x),
        lambda self, x: torch.add(x, self.bn(x)).relu(),
        lambda self, x: F.relu(self.bn(x).add_(self.conv(x))),
    ],
}


@pytest.mark.parametrize(("fused", "forward"), [(k, f) for k, forwards in SPELLINGS.items() for f in forwards])
def test_spellings(fused, forward):
    model, x = block(forward), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    assert fused_as(model) == fused
    check_same(results(model, x), results(plain, x), exact=True)


def used_twice(self, x):
    y = self.bn(x)
    return self.relu(y) + y


def added_into_another(self, x):
    y = self.conv(x)
    y += self.bn(x)
    return y


def written_before_the_sum(self, x):
    y = self.bn(x)
    z = self.relu(x)
    return y + z


def depends_on_data(self, x):
    return self.relu(self.bn(x)) if x.sum() > 0 else x


def depends_on_gradients(self, x):
    return self.relu(self.bn(x)) if torch.is_grad_enabled() else self.bn(x)


def without_gradients(self, x):
    with torch.no_grad():
        return self.relu(self.bn(x))


def counting(self, x):
    self.flag = not self.flag
    return self.relu(self.bn(x))


def drawing(self, x):
    return self.relu(self.bn(x)) if torch.rand(()) < 0.5 else x


def drawing_in_python(self, x):
    return self.relu(self.bn(x)) if random.random() < 2 else x


def asking_for_a_type(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y)) if isinstance(y, torch.Tensor) else y


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (used_twice, "used 2 times"),
        (lambda self, x: F.dropout(self.bn(x), training=self.training).relu(), "train and eval"),
        (lambda self, x: F.relu6(self.bn(x)), "relu6"),
        (lambda self, x: self.bn(x) + 1, "no other tensor"),
        (lambda self, x: torch.add(self.bn(x), x, alpha=2), "add follows"),
        (lambda self, x: self.bn(x), "returns its result"),
        (lambda self, x: self.relu(self.conv(x)), "does not call it"),
        (lambda self, x: self.relu(self.bn(x)) if self.conv.stride[0] > 1 else x, "reads 'stride' of Conv2d"),
        (added_into_another, "another tensor in place"),
        (written_before_the_sum, "relu might write"),
        (depends_on_data, "cannot be traced"),
        (depends_on_gradients, "not the same"),
        (without_gradients, "gradient or autocast mode"),
        (counting, "writes attributes"),
        (drawing, "rand"),
        (drawing_in_python, "random numbers"),
        (asking_for_a_type, "type of an intermediate"),
    ],
)
def test_what_is_left_alone(forward, why):
    model = block(forward, relu=nn.ReLU(inplace=True))
    before = dict(model.__dict__)
    assert re.search(why, why_left(model))
    assert model.__dict__.keys() == before.keys()


def test_hooks_and_unknown_layers_are_left_alone():
    model = Block()
    model.relu.register_forward_hook(lambda *_: None)
    assert "ReLU with hooks follows it" in why_left(model)
    model = Block()
    model.bn.register_forward_hook(lambda *_: None)
    assert "it has hooks" in why_left(model)

    class Own(TwinBatchNorm2d):
        def forward(self, x):
            return x

    model = Block()
    model.bn = Own(4)
    assert "Own is not known" in why_left(model)
    model = Block()
    model.relu = nn.ReLU6()
    assert "ReLU6 follows it" in why_left(model)
    model = Block()
    model.forward = lambda x: x
    assert "replaced" in why_left(model)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_layers_with_their_own_activation(act):
    model = convert_twin_bn(nn.Sequential(BatchNormAct2d(4, act_layer=act), nn.ReLU()))
    assert fused_as(model) == ("relu" if act is nn.ReLU else "")


def guarded(self, x, extra=None):
    y = self.conv(x) if self.flag else x
    y = self.relu(self.bn(y))
    return y if extra is None else y + extra


def through_a_method(self, x):
    return self.relu(self.bn(self.prepared(x)))


def test_a_replaced_method_or_forward_is_noticed():
    kind = type("Block", (Block,), {"forward": through_a_method, "prepared": lambda self, x: self.conv(x)})
    model, x = fuse_twin_bn(kind()), torch.randn(4, 4, 5, 5)
    assert fusion_report(model)[0].fused == "relu"
    model.prepared = lambda x: x
    assert torch.equal(model(x), F.relu(copy.deepcopy(model).bn(x)))
    del model.prepared
    kind.forward = lambda self, x: x
    assert model(x) is x


def test_a_child_under_two_names_that_then_differ():
    model = block(lambda self, x: self.follow(self.relu(self.bn(x))))
    model.follow = model.relu
    fuse_twin_bn(model)
    model.follow = nn.Tanh()
    assert model(torch.randn(4, 4, 5, 5)).max() <= 1


def test_a_child_whose_type_decided_is_noticed():
    def forward(self, x):
        x = self.conv(x) if isinstance(self.conv, nn.Conv2d) else x
        return self.relu(self.bn(x))

    model, x = fuse_twin_bn(block(forward)), torch.randn(4, 4, 5, 5)
    model.conv = nn.Identity()
    assert torch.equal(model(x), F.relu(copy.deepcopy(model).bn(x)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.relu(self.bn(x * 2 if torch.is_tensor(x) else x)),
        lambda self, x: torch.utils.checkpoint.checkpoint(lambda t: self.relu(self.bn(t)), x, use_reentrant=False),
        lambda self, x: torch.utils.checkpoint.checkpoint(lambda t: self.relu(self.bn(t)), x, use_reentrant=True),
    ],
    ids=["is_tensor", "checkpoint", "reentrant checkpoint"],
)
def test_what_a_trace_would_lose(forward):
    model, x = block(forward), torch.randn(4, 4, 5, 5, requires_grad=True)
    plain = copy.deepcopy(model)
    fuse_twin_bn(model)
    assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        each(x).sum().backward()
    assert model.bn.num_batches_tracked == plain.bn.num_batches_tracked


def test_statistics_read_in_between():
    def forward(self, x):
        y = self.bn(x)
        seen = self.bn.running_var.sum()
        return self.relu(y + self.conv(x)), seen

    model, x = block(forward), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    assert torch.equal(fuse_twin_bn(model)(x)[1], plain(x)[1])


def test_threads_may_fuse_their_models():
    models = [nn.Sequential(TwinBatchNorm2d(4), nn.ReLU()) for _ in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fuse_twin_bn, models))
    finally:
        sys.setswitchinterval(interval)
    assert all(fused_as(model) == "relu" for model in models)
    assert nn.Identity()(1) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_child_does_no_harm():
    model, x = (
        nn.Sequential(TwinBatchNorm2d(3), nn.ReLU(), torch.jit.script(nn.Conv2d(3, 3, 1))),
        torch.randn(4, 3, 5, 5),
    )
    plain = copy.deepcopy(model)
    assert torch.equal(fuse_twin_bn(model)(x), plain(x))
    assert len(fusion_report(model)) == 1


CHANGES = {
    "an attribute": lambda model: setattr(model, "flag", True),
    "the activation": lambda model: setattr(model, "relu", nn.Tanh()),
    "a hook on the activation": lambda model: model.relu.register_forward_hook(lambda *_: torch.zeros(1)),
    "a hook on the layer": lambda model: model.bn.register_forward_hook(lambda module, args, y: y + 1),
    "a new child": lambda model: model.add_module("more", nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_runs_its_own_forward(change):
    model, x = block(guarded), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    assert fused_as(model) == "relu"
    for each in (model, plain):
        CHANGES[change](each)
    assert not type(model).plan.holds(model)
    assert fusion_report(model)[0].fused == ""
    assert torch.equal(model(x), plain(x))
    fuse_twin_bn(model)
    assert torch.equal(model(x), plain(x))


def test_optional_and_missing_arguments_take_the_original_forward():
    model, x = block(guarded), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    fuse_twin_bn(model)
    assert torch.equal(model(x, x), plain(x, x))
    assert torch.equal(model(x=x), plain(x=x))
    assert torch.equal(model(x), plain(x))
    with pytest.raises(TypeError):
        model()


def test_a_child_taken_out_of_a_sequence():
    model = fuse_twin_bn(nn.Sequential(TwinBatchNorm2d(4), nn.ReLU(), nn.ReLU6()))
    x = torch.randn(4, 4, 3, 3)
    assert (model[:1](x) < 0).any()
    model.append(nn.Tanh())
    assert model(x).max() < 1


def test_residuals_of_other_shape_or_dtype_are_added_as_before():
    def broadcasting(self, x):
        return self.relu(self.bn(self.conv(x)) + self.follow(x))

    def in_place(self, x):
        y = self.bn(self.conv(x))
        y += self.follow(x)
        return self.relu(y)

    x = torch.randn(4, 4, 5, 5)
    for forward, follow, dtype in (
        (broadcasting, nn.AdaptiveAvgPool2d(1), torch.float32),
        (in_place, nn.AdaptiveAvgPool2d(1), torch.float32),
        (broadcasting, Double(), torch.float64),
        (in_place, Double(), torch.float32),
    ):
        model = block(forward, follow=follow)
        plain = copy.deepcopy(model)
        assert fused_as(model) == "add+relu"
        assert torch.equal(model(x), plain(x))
        assert model(x).dtype == plain(x).dtype == dtype


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_a_layer_that_runs_twice():
    model, x = block(lambda self, x: self.bn(x) + self.bn(self.conv(x))), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    (row,) = fusion_report(fuse_twin_bn(model))
    assert row.fused == "add" and "bn runs it too" in row.why
    check_same(results(model, x), results(plain, x), exact=True)


def test_layers_in_a_list_are_fused():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([TwinBatchNorm2d(4), TwinBatchNorm2d(4)])

        def forward(self, x):
            for norm in self.norms:
                x = norm(x).relu()
            return x

    model, x = Listed(), torch.randn(4, 4, 3, 3)
    fuse_twin_bn(model)
    assert [row.fused for row in fusion_report(model)] == ["relu", "relu"]
    model.norms.append(TwinBatchNorm2d(4))
    plain = revert_twin_bn(copy.deepcopy(model))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@of_lists
def test_a_forward_that_asks_whether_its_input_is_a_tensor():
    def tensor_or_list(self, x):
        x = x if isinstance(x, torch.Tensor) else torch.stack(x).sum(0)
        return self.relu(self.bn(x))

    model, x = block(tensor_or_list), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    (row,) = fusion_report(fuse_twin_bn(model))
    assert row.fused == "relu" and row.why == "where the forward gets a list"
    assert type(model).plan.takes(([x],)) and not type(model).plan.takes((x,))
    for argument in (x, [x, x], (x, x)):
        assert torch.equal(model(argument), plain(argument))


def test_a_forward_that_iterates_over_its_input_is_left_alone():
    def tensor_or_list(self, x):
        x = x if isinstance(x, torch.Tensor) else sum(each for each in x)
        return self.relu(self.bn(x))

    model, x = block(tensor_or_list), torch.randn(4, 4, 5, 5)
    plain = copy.deepcopy(model)
    assert "cannot be traced" in why_left(model)
    assert torch.equal(model(x), plain(x)) and torch.equal(model([x, x]), plain([x, x]))


def test_copies_stay_fused():
    model, x = fuse_twin_bn(build("timm ResNet")).eval(), torch.rand(2, 3, 32, 32)
    report, expected = fusion_report(model), model(x)
    deep, shallow = copy.deepcopy(model), copy.copy(model)
    for twin in (deep, shallow):
        assert fusion_report(twin) == report
        assert torch.equal(twin(x), expected)
        assert type(twin.layer1[0]).__name__ == "Bottleneck" and repr(twin) == repr(model)
        assert twin.state_dict().keys() == model.state_dict().keys()
    assert deep.conv1.weight is not model.conv1.weight and shallow.conv1 is model.conv1


def test_a_pickle_holds_the_network_before_fusing():
    plain = build("timm ResNet").eval()
    model, x = fuse_twin_bn(copy.deepcopy(plain)), torch.rand(2, 3, 32, 32)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert [type(module) for module in loaded.modules()] == [type(module) for module in plain.modules()]
        assert torch.equal(loaded(x), model(x))
        assert fusion_report(fuse_twin_bn(loaded)) == fusion_report(model)
    assert type(model) is not type(plain) and type(model).forward is not type(plain).forward


def test_twice_is_once_and_conversion_leaves_it():
    model = fuse_twin_bn(build("CifarResNet"))
    types = [type(module) for module in model.modules()]
    convert_twin_bn(fuse_twin_bn(model))
    assert [type(module) for module in model.modules()] == types
    assert is_twin(model)


def test_reverting_gives_the_original_classes():
    plain = build("torchvision Bottleneck").eval()
    fused, x = fuse_twin_bn(copy.deepcopy(plain)), torch.rand(2, 3, 32, 32)
    reverted = revert_twin_bn(fused)
    types = [type(module) for module in revert_twin_bn(copy.deepcopy(plain)).modules()]
    assert [type(module) for module in reverted.modules()] == types
    torch.testing.assert_close(reverted(x), plain(x))
    state, expected = reverted.state_dict(), revert_twin_bn(plain).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_attack_of_a_fused_network(tiny_model, batch):
    plain = convert_twin_bn(tiny_model)
    fused = fuse_twin_bn(copy.deepcopy(plain))
    images, labels = batch
    attacks = [PGD(m, eps=8 / 255, alpha=2 / 255, steps=3)(images, labels, x_init=images) for m in (plain, fused)]
    assert torch.equal(*attacks)


def test_compiled_like_the_original():
    model = fuse_twin_bn(block(guarded))
    x = torch.randn(4, 4, 5, 5)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_report_before_and_after():
    model = nn.Sequential(TwinBatchNorm2d(4), nn.ReLU())
    (row,) = fusion_report(model)
    assert (row.layer, row.fused) == ("0", "") and "can be fused" in row.why
    (row,) = fusion_report(fuse_twin_bn(model))
    assert str(row) == "0: relu"
    (row,) = fusion_report(fuse_twin_bn(TwinBatchNorm2d(4)))
    assert str(row) == ": left alone (it is the model itself)"
    for function in (fuse_twin_bn, fusion_report):
        with pytest.raises(ValueError, match="no two-wing"):
            function(nn.ReLU())
