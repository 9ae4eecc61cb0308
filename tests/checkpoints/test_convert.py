"""Rewriting checkpoints with the wings asked for."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.checkpoints.helpers import Body, TwoWing, assert_same, bn_names, torch_bytes
from twins_fast.checkpoints import CheckpointError, convert_checkpoint, load_checkpoint, read_state_dict


def convert(state: dict, tmp_path, **options) -> tuple[dict, dict]:
    source, target = tmp_path / "source.ckpt", tmp_path / "target.safetensors"
    torch.save({f"module.{name}": value for name, value in state.items()}, source)
    summary = convert_checkpoint(source, target, **options)
    assert load_checkpoint(target)[1] == summary
    return read_state_dict(target), summary


def test_convert_keep(tmp_path):
    model = Body(TwoWing, own_statistics=True)
    state, summary = convert(model.state_dict(), tmp_path)
    assert_same(state, model.state_dict())
    assert summary == {
        "entries": len(state),
        "parameters": sum(p.numel() for p in model.parameters()),
        "source_format": "torch zip",
        "wings": "keep",
    }


def test_convert_names_the_source_format(tmp_path):
    state, target = Body().state_dict(), tmp_path / "target.safetensors"
    (tmp_path / "old.pt").write_bytes(torch_bytes(state, zipped=False))
    (tmp_path / "net.bin").write_bytes(safetensors.torch.save(state))
    assert convert_checkpoint(tmp_path / "old.pt", target)["source_format"] == "torch legacy"
    assert convert_checkpoint(tmp_path / "net.bin", target)["source_format"] == "safetensors"


def test_convert_to_one_wing(tmp_path):
    source = Body(TwoWing).state_dict()
    ordinary = Body().state_dict()
    for wings, prefix in (("adaptive", ""), ("frozen", "main_bn.")):
        state, _ = convert(source, tmp_path, wings=wings)
        assert state.keys() == ordinary.keys()
        for plain, chosen in zip(bn_names(), bn_names(prefix), strict=True):
            assert torch.equal(state[plain], source[chosen])
        assert torch.equal(state["conv1.weight"], source["conv1.weight"])


def test_convert_to_two_wings(tmp_path):
    source = Body().state_dict()
    state, _ = convert(source, tmp_path, wings="twin")
    assert state.keys() == Body(TwoWing).state_dict().keys()
    for plain, frozen in zip(bn_names(), bn_names("main_bn."), strict=True):
        assert torch.equal(state[frozen], source[plain]) and torch.equal(state[plain], source[plain])


def test_convert_a_single_layer(tmp_path):
    source = TwoWing(3).state_dict()
    assert convert(source, tmp_path, wings="frozen")[0].keys() == nn.BatchNorm2d(3).state_dict().keys()
    plain = nn.BatchNorm2d(3).state_dict()
    assert convert(plain, tmp_path, wings="twin")[0].keys() == source.keys()


@pytest.mark.parametrize(
    "bn, drop, wings, words",
    [
        (nn.BatchNorm2d, None, "adaptive", "no two-wing layers"),
        (nn.BatchNorm2d, None, "frozen", "no two-wing layers"),
        (TwoWing, None, "twin", "two wings already"),
        (TwoWing, "bn1.main_bn.running_var", "frozen", r"lacks bn1\.main_bn\.running_var"),
        (TwoWing, "bn1.running_var", "adaptive", r"lacks bn1\.running_var"),
        (nn.Identity, None, "twin", "no batch norm"),
    ],
)
def test_convert_what_the_file_cannot_serve(tmp_path, bn, drop, wings, words):
    state = Body(bn).state_dict()
    state.pop(drop, None)
    with pytest.raises(CheckpointError, match=f"source.ckpt: .*{wings}.*{words}"):
        convert(state, tmp_path, wings=wings)
    assert not (tmp_path / "target.safetensors").exists()


def test_convert_spares_the_source(tmp_path):
    source = tmp_path / "net.safetensors"
    safetensors.torch.save_file(Body().state_dict(), source)
    whole = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors", tmp_path / "." / "net.safetensors"):
        with pytest.raises(CheckpointError, match="the target is the source"):
            convert_checkpoint(source, target)
    assert source.read_bytes() == whole
    with pytest.raises(ValueError, match="wings must be one of keep"):
        convert_checkpoint(source, tmp_path / "b.safetensors", wings="both")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_convert_refuses_a_network_that_diverged(tmp_path, value, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in Body(TwoWing).state_dict().items()}
    for name in ("bn1.running_var", "layer1.0.conv1.weight", "fc.bias"):
        state[name].flatten()[-1] = value
    with pytest.raises(CheckpointError) as caught:
        convert(state, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'source.ckpt'}: cannot convert with wings='keep': "
        f"3 of its {len(state)} entries have NaN or infinite values, the first is bn1.running_var"
    )
    assert not (tmp_path / "target.safetensors").exists()
    assert read_state_dict(tmp_path / "source.ckpt").keys() == state.keys()


def test_convert_judges_only_what_it_writes(tmp_path):
    state = Body(TwoWing).state_dict()
    state["bn1.main_bn.running_mean"][0] = float("nan")
    assert "bn1.main_bn.running_mean" not in convert(state, tmp_path, wings="adaptive")[0]
    with pytest.raises(CheckpointError, match="wings='frozen': 1 of .* the first is bn1.running_mean"):
        convert(state, tmp_path, wings="frozen")
