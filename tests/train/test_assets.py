"""The images that come with the package."""

import numpy as np

from twins_fast.train import assets
from twins_fast.train.recipes import TARGET_CLASSES


def test_embedded_images_are_real_and_small():
    images, labels, classes, train_images = assets.read_images()
    assert classes == TARGET_CLASSES and images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    for part in (labels[:train_images], labels[train_images:]):
        counts = np.bincount(part)
        assert counts.min() == counts.max() >= 100
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert sum(path.stat().st_size for path in assets.FOLDER.iterdir()) < 8_000_000


def test_sheet_of_images_is_lossless(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (45, 32, 32, 3), np.uint8)
    labels = np.arange(45) % 2
    assets.write_images(images, labels, ("a", "b"), 30, tmp_path)
    back, back_labels, classes, train_images = assets.read_images(tmp_path)
    assert np.array_equal(back, images) and np.array_equal(back_labels, labels)
    assert classes == ("a", "b") and train_images == 30
