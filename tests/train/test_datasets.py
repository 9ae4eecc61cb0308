"""Data sets by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from twins_fast.train.datasets import CIFAR10_CLASSES, DataError, load_datasets
from twins_fast.train.loaders import loaders
from twins_fast.train.recipes import TARGET_CLASSES


def test_class_subset_is_relabelled_in_the_asked_order(tmp_path):
    labels = np.arange(40) % 10
    images = np.broadcast_to(labels[:, None, None, None], (40, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "ten.npz"
    np.savez(path, train=images, train_labels=labels, test=images, test_labels=labels)
    train, _, classes = load_datasets("npz", path, classes=TARGET_CLASSES)
    assert classes == TARGET_CLASSES and len(train) == 20
    for image, label in train:
        assert CIFAR10_CLASSES[image[0, 0, 0]] == classes[label]
    with pytest.raises(DataError, match="no class zebra"):
        load_datasets("npz", path, classes=("zebra",))


def test_image_folder_is_cropped_to_224(tmp_path):
    for part in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(4):
                Image.new("L" if k else "RGB", (300, 280), 40 + 100 * index).save(folder / f"{k}.png")
    train, test, classes = load_datasets("folder", tmp_path)
    assert classes == ("cat", "dog")
    made = loaders(train, test, batch_size=4, augmentation="high-resolution")
    for loader in (made.train, made.test):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 224, 224)
        torch.testing.assert_close(images[:, 0, 112, 112], (40 + 100 * labels) / 255)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.uint8)
WRONG = {
    "missing file": (lambda p: p / "no.npz", "npz", "no.npz' does not exist"),
    "not an npz": (lambda p: (p / "x.npz").write_text("hello") and p / "x.npz", "npz", "cannot read .*x.npz"),
    "array missing": (
        lambda p: write_npz(p / "x.npz", train=IMAGES, train_labels=LABELS),
        "npz",
        "lacks the array.s. test, test_labels",
    ),
    "float images": (
        lambda p: write_npz(p / "x.npz", train=IMAGES / 1, train_labels=LABELS, test=IMAGES, test_labels=LABELS),
        "npz",
        "uint8.*float64",
    ),
    "labels too few": (
        lambda p: write_npz(p / "x.npz", train=IMAGES, train_labels=LABELS[:2], test=IMAGES, test_labels=LABELS),
        "npz",
        r"labels must have shape \[4\], got \[2\]",
    ),
    "float labels": (
        lambda p: write_npz(p / "x.npz", train=IMAGES, train_labels=LABELS / 1, test=IMAGES, test_labels=LABELS),
        "npz",
        "x.npz': labels must be integers, got float64",
    ),
    "label without a class": (
        lambda p: write_npz(p / "x.npz", train=IMAGES, train_labels=LABELS, test=IMAGES, test_labels=LABELS + 5),
        "npz",
        r"labels must be in \[0, 0\], got values from 5 to 5",
    ),
    "one wild label": (
        lambda p: write_npz(
            p / "x.npz",
            train=IMAGES,
            train_labels=np.array([0, 1, 2, 10**9]),
            test=IMAGES,
            test_labels=LABELS,
        ),
        "npz",
        "train_labels go up to 1000000000, but name only 4 classes",
    ),
    "one label too many": (
        lambda p: write_npz(
            p / "x.npz",
            train=IMAGES,
            train_labels=np.array([0, 1, 2, 1]),
            test=IMAGES,
            test_labels=np.array([0, 1, 0, 1]),
        ),
        "npz",
        "no test image has label 2; if that is meant, add an array of class names",
    ),
    "no images": (
        lambda p: write_npz(p / "x.npz", train=IMAGES[:0], train_labels=LABELS[:0], test=IMAGES, test_labels=LABELS),
        "npz",
        "there are no images",
    ),
    "images of another size": (
        lambda p: write_npz(
            p / "x.npz", train=np.zeros((4, 64, 64, 3), np.uint8), train_labels=LABELS, test=IMAGES, test_labels=LABELS
        ),
        "npz",
        "32 x 32 pixels, but the images have 64 x 64",
    ),
    "no root": (lambda p: None, "npz", "needs a data root .--data-root.: an .npz file"),
    "root is no folder": (lambda p: p / "nowhere", "folder", "nowhere' is not a folder"),
    "no train folder": (lambda p: p, "folder", "must hold train/CLASS"),
    "npz wanted, folder given": (lambda p: p, "npz", "needs an .npz file"),
    "unknown": (lambda p: p, "imagenet", "unknown dataset 'imagenet'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_root_without_the_data_is_a_clear_error(tmp_path, name):
    make_root, dataset, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        train, test, _ = load_datasets(dataset, make_root(tmp_path))
        loaders(train, test, batch_size=8)


def test_classes_of_other_data_sets_cannot_be_chosen():
    with pytest.raises(DataError, match="from an .npz file only, got ship"):
        load_datasets("embedded", classes=("ship",))


def test_truncated_npz_is_a_clear_error(npz):
    npz.write_bytes(npz.read_bytes()[:20_000])
    with pytest.raises(DataError, match="cannot read"):
        load_datasets("npz", npz)
