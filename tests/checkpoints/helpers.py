"""Networks, checkpoints and comparisons that the tests of checkpoints share."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class TwoWing(nn.BatchNorm2d):
    """Entries of a two-wing layer."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.main_bn = nn.BatchNorm2d(channels)


class Body(nn.Module):
    """A few layers named as in a ResNet."""

    def __init__(self, bn=nn.BatchNorm2d, classes: int = 5, downstream: int | None = 3, own_statistics: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = bn(4)
        block = nn.Module()
        block.conv1 = nn.Conv2d(4, 8, 1, bias=False)
        block.bn1 = bn(8)
        block.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), bn(8))
        self.layer1 = nn.Sequential(block)
        self.fc = nn.Linear(8, classes)
        if downstream:
            self.fc_downstream = nn.Linear(8, downstream)
        if own_statistics:
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
        for value in self.state_dict().values():
            value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.randint(9, value.shape))


BN_LAYERS = ("bn1", "layer1.0.bn1", "layer1.0.downsample.1")
BN_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_names(wing: str = "") -> list[str]:
    return [f"{layer}.{wing}{leaf}" for layer in BN_LAYERS for leaf in BN_LEAVES]


def robustness_checkpoint(state: dict, key: str = "model") -> dict:
    """Laid out as the robustness library's trainer does."""
    network = OrderedDict()
    network["module.normalizer.new_mean"] = torch.rand(3, 1, 1)
    network["module.normalizer.new_std"] = torch.rand(3, 1, 1)
    network.update({f"module.model.{name}": value for name, value in state.items()})
    network["module.attacker.normalize.new_mean"] = torch.rand(3, 1, 1)
    network["module.attacker.normalize.new_std"] = torch.rand(3, 1, 1)
    network.update({f"module.attacker.model.{name}": value for name, value in state.items()})
    scalars = [np.float64(0.1), np.float32(0.5), np.int64(7), np.bool_(True)]
    return {
        key: network,
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(4)}}, "param_groups": [{"lr": scalars[0]}]},
        "schedule": {"base_lrs": scalars, "last_epoch": np.int32(3)},
        "epoch": 90,
        "nat_prec1": torch.tensor(63.9),
    }


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
        assert state[name].device.type == "cpu" and not state[name].requires_grad


def torch_bytes(content, zipped: bool, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def save(folder: Path, content, zipped: bool = True, protocol: int = 2) -> Path:
    """``torch.save`` into a file of ``folder``."""
    path = folder / "net.ckpt"
    path.write_bytes(torch_bytes(content, zipped, protocol))
    return path


def file_with_pickle(folder: Path, data: bytes, zipped: bool) -> Path:
    """A file of PyTorch's layout whose content is the pickle ``data``."""
    path, marker = folder / "net.ckpt", 0x5EED
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        protocol = max(2, min(data[1], 5))
        head, tail = torch_bytes(marker, False, protocol).split(pickle.dumps(marker, protocol))
        path.write_bytes(head + data + tail)
    return path
