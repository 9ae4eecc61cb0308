"""Loading a state dict into ordinary and two-wing networks."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from tests.checkpoints.helpers import Body, TwoWing, assert_same, bn_names, robustness_checkpoint, save
from twins_fast.checkpoints import CheckpointError, adopt_source_head, load_pretrained, load_state, read_state_dict
from twins_fast.models import build_model
from twins_fast.nn import convert_twin_bn


def test_load_state_casts_and_copies():
    model, source = Body(), Body().state_dict()
    half = {k: v.half() if v.is_floating_point() else v.int() for k, v in source.items()}
    load_state(model, half)
    for name, value in model.state_dict().items():
        assert value.dtype == source[name].dtype and torch.equal(value, half[name].to(value.dtype))
        assert value.data_ptr() != half[name].data_ptr()


def test_load_state_lists_everything_and_changes_nothing():
    model = Body()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = Body().state_dict()
    del state["bn1.bias"], state["fc_downstream.weight"]
    state["stray.weight"] = torch.ones(1)
    state["conv1.weight"] = torch.ones(4, 3, 7, 7)
    state["bn1.num_batches_tracked"] = torch.tensor(1.0)
    state["layer1.0.bn1.weight"] = torch.ones(8, dtype=torch.int64)
    state["fc.bias"] = torch.full((5,), float("nan"))
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: bn1.bias",
        "  missing: fc_downstream.weight",
        "  extra: stray.weight",
        "  conv1.weight: shape [4, 3, 7, 7] in the checkpoint, [4, 3, 3, 3] in the model",
        "  bn1.num_batches_tracked: torch.float32 in the checkpoint, torch.int64 in the model",
        "  layer1.0.bn1.weight: torch.int64 in the checkpoint, torch.float32 in the model",
        "  fc.bias: NaN or infinite values (as torch.float32)",
    ]
    assert_same(model.state_dict(), before)


def test_load_state_refuses_what_overflows_in_the_models_dtype():
    with pytest.raises(CheckpointError, match="weight: NaN or infinite"):
        load_state(nn.Linear(1, 1, bias=False).half(), {"weight": torch.full((1, 1), 1e6)})


def test_load_state_allows_whole_modules_only():
    state = Body().state_dict()
    without_heads = {k: v for k, v in state.items() if not k.startswith("fc")}
    with pytest.raises(CheckpointError) as caught:
        load_state(Body(), without_heads, allow_missing=("fc",))
    assert str(caught.value).count("missing: fc_downstream.") == 2 and "fc.weight" not in str(caught.value)
    load_state(Body(), without_heads, allow_missing=("fc.", "fc_downstream.weight", "fc_downstream.bias"))
    load_state(Body(downstream=None), state, allow_extra=["fc_downstream"])


@pytest.mark.parametrize("bn", [nn.BatchNorm2d, TwoWing])
@pytest.mark.parametrize("head", [None, 3, 10])
def test_pretrained_body_and_fresh_head(bn, head):
    model, source = Body(bn), Body(downstream=head).state_dict()
    fresh = {k: v.clone() for k, v in model.fc_downstream.state_dict().items()}
    load_pretrained(model, source)
    loaded = model.state_dict()
    for name, value in source.items():
        if not name.startswith("fc_downstream"):
            assert torch.equal(loaded[name], value), name
    if bn is TwoWing:
        for plain, frozen in zip(bn_names(), bn_names("main_bn."), strict=True):
            assert torch.equal(loaded[frozen], source[plain]), frozen
            assert loaded[frozen].data_ptr() != loaded[plain].data_ptr()
    assert_same(model.fc_downstream.state_dict(), fresh)


def test_pretrained_two_wing_file():
    source = Body(TwoWing).state_dict()
    twin, plain = Body(TwoWing), Body()
    load_pretrained(twin, source)
    load_pretrained(plain, source)
    for name in bn_names() + bn_names("main_bn."):
        assert torch.equal(twin.state_dict()[name], source[name])
    for name in bn_names():
        assert torch.equal(plain.state_dict()[name], source[name])


def test_pretrained_wings_are_not_mixed():
    source = Body(TwoWing).state_dict()
    del source["bn1.main_bn.running_var"]
    with pytest.raises(CheckpointError, match=r"missing: bn1\.main_bn\.running_var"):
        load_pretrained(Body(TwoWing), source)


def test_pretrained_imagenet_head_and_input_statistics():
    without_fc = {k: v for k, v in Body().state_dict().items() if not k.startswith("fc.")}
    load_pretrained(Body(own_statistics=True), without_fc)
    headless = Body(own_statistics=True)
    del headless.fc
    load_pretrained(headless, Body(own_statistics=True).state_dict())
    with pytest.raises(CheckpointError, match=r"fc\.bias: shape \[7\] in the checkpoint, \[5\] in the model"):
        load_pretrained(Body(), Body(classes=7).state_dict())

    source = Body(own_statistics=True).state_dict()
    model = Body()
    with pytest.raises(CheckpointError, match="extra: mean\n  extra: std"):
        load_pretrained(model, source)
    model.register_buffer("mean", source["mean"].flatten().clone(), persistent=False)
    model.register_buffer("std", source["std"].clone(), persistent=False)
    load_pretrained(model, source)
    model.std.mul_(2)
    with pytest.raises(CheckpointError, match="model:\n  extra: std$"):
        load_pretrained(model, source)


def test_pretrained_from_a_robustness_file_into_the_package_layer(tmp_path):
    source = Body(downstream=None).state_dict()
    path = save(tmp_path, robustness_checkpoint(source))
    late = Body()
    load_pretrained(late, read_state_dict(path))
    late, early = convert_twin_bn(late), convert_twin_bn(Body())
    load_pretrained(early, read_state_dict(path))
    early.fc_downstream.load_state_dict(late.fc_downstream.state_dict())
    assert_same(early.state_dict(), late.state_dict())


def test_a_head_of_other_classes_is_refused_in_these_words():
    source, target = build_model("cifar-resnet18-w16", 5), build_model("cifar-resnet18-w16", 10)
    with pytest.raises(CheckpointError, match=r"fc_downstream.bias: the checkpoint is for 5 classes, the model for 10"):
        load_state(target, source.state_dict())


class TestSourceHead:
    def test_it_is_the_head_of_one_of_our_networks(self):
        source, target = build_model("cifar-resnet18-w16", 5), build_model("cifar-resnet18-w16", 10)
        adopt_source_head(target, source.state_dict())
        load_pretrained(target, source.state_dict())
        assert torch.equal(target.fc.weight, source.fc_downstream.weight) and target.fc.out_features == 5
        assert target.fc_downstream.out_features == 10 and torch.equal(target.conv1.weight, source.conv1.weight)

    def test_or_the_one_that_was_kept_of_whatever_size(self):
        target, state = build_model("resnet18", 10), torchvision.models.resnet18(num_classes=7).state_dict()
        adopt_source_head(target, state)
        load_pretrained(target, state)
        assert torch.equal(target.fc.weight, state["fc.weight"])

    def test_a_network_without_one(self, tiny_model):
        with pytest.raises(CheckpointError, match="the checkpoint has no linear head, neither fc nor fc_downstream"):
            adopt_source_head(tiny_model, {"conv1.weight": torch.ones(1)})
