"""Data sets by name: images as PIL or uint8 arrays, labels, class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets as tv_datasets

from twins_fast.train import assets, torchvision_data
from twins_fast.validation import check_choice

DATASETS = {
    **{
        name: f"a folder for torchvision's {source.kind.__name__} (downloaded if missing)"
        for name, source in torchvision_data.SOURCES.items()
    },
    "cifar10": "a folder for torchvision's CIFAR-10 (downloaded if missing), or an .npz file",
    "cifar100": "a folder for torchvision's CIFAR-100 (downloaded if missing), or an .npz file",
    "folder": "a folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images",
    "npz": "an .npz file with train, train_labels, test and test_labels",
    "embedded": "the real images that come with the package",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DataError(ValueError):
    """A data set that is not there, or not in the expected form."""


class ImageArray(Dataset):
    """Images [N, H, W, 3] uint8 with labels [N], in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise DataError(f"labels must have shape [{len(images)}], got {list(labels.shape)}")
        if len(images) == 0:
            raise DataError("there are no images")
        if labels.dtype.kind not in "iu":
            raise DataError(f"labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"labels must be in [0, {len(classes) - 1}], got values from {labels.min()} to {labels.max()}"
            )
        self.images = images
        self.labels = labels.astype(np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def load_datasets(
    dataset: str, root: str | Path | None = None, *, classes: tuple[str, ...] = (), seed: int = 0
) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Training and test sets (images as PIL or [H, W, 3] uint8 arrays) and the class names.

    Args:
        dataset: a key of :data:`DATASETS`.
        root: a folder (torchvision sets, ``folder``) or an ``.npz`` file with ``train`` [N, H, W, 3] uint8,
            ``train_labels`` [N], ``test``, ``test_labels`` and optionally ``classes``; every data set but
            ``embedded`` may be such a file.
        classes: subset of the classes of an ``.npz`` file, in label order; empty for all.
        seed: chooses the training images where a data set comes in one part.

    Raises:
        ValueError: an unknown name.
        DataError: no data set there; the message says what was looked for.
    """
    check_choice("dataset", dataset, DATASETS)
    is_npz = root is not None and Path(root).suffix == ".npz"
    if root is None and dataset != "embedded":
        raise DataError(f"dataset {dataset!r} needs a data root (--data-root): {DATASETS[dataset]}")
    if classes and not is_npz:
        raise DataError(f"classes can be chosen from an .npz file only, got {', '.join(classes)}")
    if dataset == "embedded":
        return _embedded()
    root = Path(root)
    if is_npz:
        return _npz(root, classes)
    if dataset == "npz":
        raise DataError(f"dataset 'npz' needs an .npz file as data root (--data-root), got {str(root)!r}")
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder; expected {DATASETS[dataset]}")
    if dataset == "folder":
        return _folder(root)
    try:
        return torchvision_data.read(dataset, root, seed)
    except torchvision_data.NotThere as error:
        raise DataError(str(error)) from None


def _embedded() -> tuple[ImageArray, ImageArray, tuple[str, ...]]:
    images, labels, classes, train_images = assets.read_images()
    first, rest = slice(0, train_images), slice(train_images, None)
    return (
        ImageArray(images[first], labels[first], classes),
        ImageArray(images[rest], labels[rest], classes),
        classes,
    )


def _npz(path: Path, chosen: tuple[str, ...]) -> tuple[ImageArray, ImageArray, tuple[str, ...]]:
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}  # what is no .npy comes as bytes
    except Exception as error:
        raise DataError(f"cannot read {str(path)!r} as .npz: {error}") from error
    missing = [name for name in ("train", "train_labels", "test", "test_labels") if name not in arrays]
    if missing:
        raise DataError(f"{str(path)!r} lacks the array(s) {', '.join(missing)}; it holds {', '.join(sorted(arrays))}")
    if "classes" in arrays:
        classes = tuple(map(str, arrays["classes"]))
    else:
        present = np.unique(arrays["train_labels"])
        count = int(present.max(initial=0)) + 1
        if count > len(present) > 0:  # one wild label would make thousands of classes
            raise DataError(f"{str(path)!r}: train_labels go up to {count - 1}, but name only {len(present)} classes")
        untested = np.setdiff1d(present, arrays["test_labels"])
        if 0 < len(untested) < len(present):  # or just one more
            raise DataError(
                f"{str(path)!r}: no test image has label {', '.join(map(str, untested[:10]))}; if that is meant, "
                "add an array of class names, classes"
            )
        classes = CIFAR10_CLASSES if count == 10 else tuple(map(str, range(count)))
    unknown = [name for name in chosen if name not in classes]
    if unknown:
        raise DataError(f"the data set has no class {', '.join(unknown)}; it has {', '.join(classes)}")
    try:
        sets = [ImageArray(arrays[part], arrays[f"{part}_labels"], classes) for part in ("train", "test")]
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}") from None
    if chosen:
        sets = [_only(whole, chosen) for whole in sets]
    return sets[0], sets[1], sets[0].classes


def _only(whole: ImageArray, chosen: tuple[str, ...]) -> ImageArray:
    """The images of some classes, labelled in the order of ``chosen``."""
    new_label = np.full(len(whole.classes), -1)
    new_label[[whole.classes.index(name) for name in chosen]] = np.arange(len(chosen))
    labels = new_label[whole.labels]
    return ImageArray(whole.images[labels >= 0], labels[labels >= 0], chosen)


def _folder(root: Path) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    train_folder = root / "train"
    test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train_folder.is_dir() or test_folder is None:
        raise DataError(f"{str(root)!r} must hold {DATASETS['folder'].removeprefix('a folder with ')}")
    try:
        train, test = tv_datasets.ImageFolder(train_folder), tv_datasets.ImageFolder(test_folder)
    except FileNotFoundError as error:
        raise DataError(f"{str(root)!r}: {error}") from error
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{str(root)!r}: training and test folders differ in the classes {', '.join(differing[:10])}")
    return train, test, tuple(train.classes)
