"""Data sets, augmentation and order."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from twins_fast.train import assets, data
from twins_fast.train.data import DataError
from twins_fast.train.recipes import CIFAR10_CLASSES, TARGET_CLASSES, get_recipe


def recipe_for(dataset="npz", **overrides):
    return get_recipe("mini-pretrain", dataset=dataset, classes=(), batch_size=8, eval_images=0, **overrides)


def batches(recipe, sets, epoch=0, first=0):
    loader, _ = data.loaders(recipe, *sets)
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    return list(loader)


def test_npz_batches_are_float_images_in_zero_one(npz):
    recipe = recipe_for()
    train, test, classes = data.load_datasets(recipe, npz)
    assert classes == ("0", "1", "2") and (len(train), len(test)) == (24, 12)
    images, labels = batches(recipe, (train, test))[0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert 0 <= images.min() and 0.5 < images.max() <= 1
    _, loader = data.loaders(recipe, train, test)
    seen = torch.cat([images for images, _ in loader])
    expected = torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen, expected)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(npz):
    recipe = recipe_for()
    sets = data.load_datasets(recipe, npz)[:2]
    first = batches(recipe, sets)
    torch.rand(7)  # somebody else uses the global generator
    again = batches(recipe, sets)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    resumed = batches(recipe, sets, first=2)
    assert len(resumed) == 1 and torch.equal(resumed[0][0], first[2][0])
    assert not torch.equal(batches(recipe, sets, epoch=1)[0][1], first[0][1])
    workers = batches(recipe_for(workers=2), sets)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, workers, strict=True))


def test_augmentation_leaves_the_global_generator_alone(npz):
    recipe = recipe_for()
    sets = data.load_datasets(recipe, npz)[:2]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    dataset = data.loaders(recipe, *sets)[0].dataset
    dataset[0, 5], dataset[1, 5]
    assert torch.equal(torch.rand(2), expected)


def test_a_last_batch_too_small_for_two_wings_is_left_out():
    assert len(data.EpochBatches(27, 8, seed=0, shuffle=True)) == 3
    assert len(data.EpochBatches(28, 8, seed=0, shuffle=True)) == 4
    assert len(data.EpochBatches(25, 8, seed=0, shuffle=False)) == 4


def test_class_subset_is_relabelled_in_the_asked_order(tmp_path):
    labels = np.arange(40) % 10
    images = np.broadcast_to(labels[:, None, None, None], (40, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "ten.npz"
    np.savez(path, train=images, train_labels=labels, test=images, test_labels=labels)
    recipe = get_recipe("mini-pretrain", classes=TARGET_CLASSES)
    train, _, classes = data.load_datasets(recipe, path)
    assert classes == TARGET_CLASSES and len(train) == 20
    for image, label in train:
        assert CIFAR10_CLASSES[image[0, 0, 0]] == classes[label]
    with pytest.raises(DataError, match="no class zebra"):
        data.load_datasets(get_recipe("mini-pretrain", classes=("zebra",)), path)


def test_image_folder_is_cropped_to_224(tmp_path):
    for part in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(4):
                Image.new("L" if k else "RGB", (300, 280), 40 + 100 * index).save(folder / f"{k}.png")
    recipe = get_recipe("cub200", batch_size=4, workers=0)
    train, test, classes = data.load_datasets(recipe, tmp_path)
    assert classes == ("cat", "dog")
    for loader in data.loaders(recipe, train, test):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 224, 224)
        torch.testing.assert_close(images[:, 0, 112, 112], (40 + 100 * labels) / 255)


def test_torchvision_cifar10_is_read_from_its_own_files(tmp_path):
    """Files in torchvision's format; the checksums of the real ones are switched off."""
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": generator.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        patch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: None)
        recipe = get_recipe("cifar10", batch_size=8, workers=0)
        train, test, classes = data.load_datasets(recipe, tmp_path)
    assert classes == CIFAR10_CLASSES and (len(train), len(test)) == (50, 10)
    images, _ = next(iter(data.loaders(recipe, train, test)[0]))
    assert images.shape == (8, 3, 32, 32)


def test_caltech_split_takes_sixty_of_each_class_for_training(monkeypatch, tmp_path):
    class Whole(torch.utils.data.Dataset):
        y = [0] * 70 + [1] * 90
        categories = ["a", "b"]

        def __len__(self):
            return len(self.y)

    monkeypatch.setattr(data, "_downloaded", lambda *_, **__: Whole())
    train, test, classes = data.load_datasets(get_recipe("caltech256"), tmp_path)
    assert classes == ("a", "b")
    assert np.bincount([Whole.y[i] for i in train.indices]).tolist() == [60, 60]
    assert sorted([*train.indices, *test.indices]) == list(range(160))


def test_embedded_images_are_real_and_small():
    images, labels, classes, train_images = assets.read_images()
    assert classes == TARGET_CLASSES and images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    for part in (labels[:train_images], labels[train_images:]):
        counts = np.bincount(part)
        assert counts.min() == counts.max() >= 100
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert sum(path.stat().st_size for path in assets.FOLDER.iterdir()) < 6_000_000


def test_sheet_of_images_is_lossless(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (45, 32, 32, 3), np.uint8)
    labels = np.arange(45) % 2
    assets.write_images(images, labels, ("a", "b"), 30, tmp_path)
    back, back_labels, classes, train_images = assets.read_images(tmp_path)
    assert np.array_equal(back, images) and np.array_equal(back_labels, labels)
    assert classes == ("a", "b") and train_images == 30


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
    "no root": (lambda p: None, "npz", "needs --data-root"),
    "root is no folder": (lambda p: p / "nowhere", "folder", "nowhere' is not a folder"),
    "no train folder": (lambda p: p, "folder", "must hold train/CLASS"),
    "npz wanted, folder given": (lambda p: p, "npz", "needs an .npz file"),
    "unknown": (lambda p: p, "imagenet", "unknown dataset 'imagenet'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_root_without_the_data_is_a_clear_error(tmp_path, name):
    make_root, dataset, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        train, test, _ = data.load_datasets(recipe_for(dataset), make_root(tmp_path))
        data.loaders(recipe_for(dataset), train, test)


def test_classes_of_other_data_sets_cannot_be_chosen():
    with pytest.raises(DataError, match="from an .npz file only, got ship"):
        data.load_datasets(get_recipe("mini", classes=("ship",)), None)


def test_truncated_npz_is_a_clear_error(npz):
    npz.write_bytes(npz.read_bytes()[:20_000])
    with pytest.raises(DataError, match="cannot read"):
        data.load_datasets(recipe_for(), npz)


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", refuse)
    with pytest.raises(DataError, match="CIFAR100 is not in .* could not be downloaded .no network.; put"):
        data.load_datasets(get_recipe("cifar100"), tmp_path)
