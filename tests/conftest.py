"""Small networks and data that several tests share."""

import numpy as np
import pytest
import torch

from tests.gpu_faults import pytest_runtest_logfinish, pytest_runtest_makereport  # noqa: F401
from twins_fast.models import CifarResNet


@pytest.fixture
def tiny_model():
    """A two-stage residual network of width 4 for 3 classes, deterministic."""
    torch.manual_seed(0)
    return CifarResNet(num_classes=3, width=4, blocks=(1, 1))


@pytest.fixture
def batch():
    """Images [8, 3, 8, 8] in [0, 1] and labels of 3 classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)


@pytest.fixture
def exact():
    """Convolutions in full float32, so that two ways to compute them agree."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def npz(tmp_path):
    """An .npz data set: 3 classes that differ in their dominant channel, 32 x 32 pixels."""
    generator = np.random.default_rng(0)

    def part(count):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 100
        return images, labels.astype(np.uint8)

    train, train_labels = part(24)
    test, test_labels = part(12)
    path = tmp_path / "tiny data.npz"
    np.savez(path, train=train, train_labels=train_labels, test=test, test_labels=test_labels)
    return path
