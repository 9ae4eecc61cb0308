"""Data sets as float images [3, H, W] in [0, 1], in an order and augmentation that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets as tv_datasets
from torchvision.transforms import v2

from twins_fast.train import assets
from twins_fast.train.recipes import CIFAR10_CLASSES, Recipe

MIN_BATCH = 4  # a last batch smaller than this is left out: its adaptive half may lack batch statistics
_CALTECH_TRAIN_PER_CLASS = 60


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


class Augmented(Dataset):
    """``base`` behind ``transform``, whose randomness depends on (seed, epoch, index) alone.

    Items are asked for as ``(epoch, index)``: so neither the number of workers nor a resumed run
    changes any image.
    """

    def __init__(self, base: Dataset, transform: Callable, seed: int):
        self.base = base
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.base[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, epoch, index))
            return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)`` keys; each epoch's order depends on (seed, epoch) alone."""

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.first = 0  # batches to skip, when a run is resumed in the middle of an epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (rest >= MIN_BATCH if self.shuffle else rest > 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = range(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chosen]


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that is well mixed from a few integers (SeedSequence of NumPy)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_datasets(recipe: Recipe, data_root: str | Path | None) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Training and test sets of a recipe (images as PIL or uint8 arrays) and the class names.

    Args:
        recipe: says which data set.
        data_root: a folder (torchvision sets, ``folder``) or an ``.npz`` file with ``train``
            [N, H, W, 3] uint8, ``train_labels`` [N], ``test``, ``test_labels`` and optionally
            ``classes``. The CIFAR-10 recipe takes either.

    Raises:
        DataError: no data set there; the message says what was looked for.
    """
    if recipe.dataset not in DATASETS:
        raise DataError(f"unknown dataset {recipe.dataset!r}; choose from {', '.join(sorted(DATASETS))}")
    is_npz = data_root is not None and Path(data_root).suffix == ".npz"
    if recipe.classes and not is_npz:
        raise DataError(f"classes can be chosen from an .npz file only, got {', '.join(recipe.classes)}")
    if recipe.dataset == "embedded":
        return _embedded()
    if data_root is None:
        raise DataError(f"recipe {recipe.name!r} needs --data-root: {DATASETS[recipe.dataset]}")
    root = Path(data_root)
    if is_npz:
        return _npz(root, recipe.classes)
    if recipe.dataset == "npz":
        raise DataError(f"recipe {recipe.name!r} needs an .npz file as --data-root, got {str(root)!r}")
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder; expected {DATASETS[recipe.dataset]}")
    if recipe.dataset == "folder":
        return _folder(root)
    if recipe.dataset == "caltech256":
        return _caltech256(root, recipe.seed)
    kind = tv_datasets.CIFAR10 if recipe.dataset == "cifar10" else tv_datasets.CIFAR100
    train = _downloaded(kind, root, train=True)
    return train, _downloaded(kind, root, train=False), tuple(train.classes)


DATASETS = {
    "cifar10": "a folder for torchvision's CIFAR-10 (downloaded if missing), or an .npz file",
    "cifar100": "a folder for torchvision's CIFAR-100 (downloaded if missing)",
    "caltech256": "a folder for torchvision's Caltech-256 (downloaded if missing)",
    "folder": "a folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images",
    "npz": "an .npz file with train, train_labels, test and test_labels",
    "embedded": "the real images that come with the package",
}


def loaders(recipe: Recipe, train: Dataset, test: Dataset) -> tuple[DataLoader, DataLoader]:
    """Data loaders of (images [B, 3, H, W] float32 in [0, 1], labels [B] int64)."""
    if recipe.augmentation == "cifar" and isinstance(train, ImageArray) and train.images.shape[1:3] != (32, 32):
        height, width = train.images.shape[1:3]
        raise DataError(f"augmentation 'cifar' is for 32 x 32 pixels, but the images have {height} x {width}")
    if recipe.eval_images:
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed))
        test = Subset(test, torch.randperm(len(test), generator=generator)[: recipe.eval_images].sort()[0].tolist())
    return (
        _loader(recipe, train, train_transform(recipe.augmentation), shuffle=True),
        _loader(recipe, test, eval_transform(recipe.augmentation), shuffle=False),
    )


def train_transform(augmentation: str) -> Callable:
    """Published augmentation, on PIL or uint8 images; pixels stay in [0, 1]."""
    steps = {
        "none": [],
        "cifar": [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
        "high-resolution": [v2.Resize(256), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()],
    }[augmentation]
    return v2.Compose([v2.ToImage(), v2.RGB(), *steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def eval_transform(augmentation: str) -> Callable:
    """Published test-time transform."""
    steps = [v2.Resize(256), v2.CenterCrop(224)] if augmentation == "high-resolution" else []
    return v2.Compose([v2.ToImage(), v2.RGB(), *steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _loader(recipe: Recipe, data: Dataset, transform: Callable, shuffle: bool) -> DataLoader:
    batches = EpochBatches(len(data), recipe.batch_size, recipe.seed, shuffle)
    if len(batches) == 0:
        kind, least = ("training", MIN_BATCH) if shuffle else ("test", 1)
        raise DataError(f"the {kind} set has {len(data)} images; at least {least} needed")
    return DataLoader(
        Augmented(data, transform, recipe.seed),
        batch_sampler=batches,
        num_workers=recipe.workers,
        pin_memory=torch.cuda.is_available(),
    )


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
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise DataError(f"cannot read {str(path)!r} as .npz: {error}") from error
    missing = [name for name in ("train", "train_labels", "test", "test_labels") if name not in arrays]
    if missing:
        raise DataError(f"{str(path)!r} lacks the array(s) {', '.join(missing)}; it holds {', '.join(sorted(arrays))}")
    if "classes" in arrays:
        classes = tuple(map(str, arrays["classes"]))
    else:
        count = int(arrays["train_labels"].max(initial=0)) + 1
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


def _caltech256(root: Path, seed: int) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """60 training images per class (Salman et al., arXiv 2007.08489), the rest for testing."""
    whole = _downloaded(tv_datasets.Caltech256, root)
    labels = np.array(whole.y)
    order = np.random.default_rng(derived_seed(seed)).permutation(len(labels))
    train = np.concatenate([order[labels[order] == k][:_CALTECH_TRAIN_PER_CLASS] for k in range(len(whole.categories))])
    test = np.setdiff1d(order, train)
    return Subset(whole, sorted(train.tolist())), Subset(whole, test.tolist()), tuple(whole.categories)


def _downloaded(kind, root: Path, **options) -> Dataset:
    try:
        return kind(str(root), download=True, **options)
    except Exception as error:
        raise DataError(
            f"{kind.__name__} is not in {str(root)!r} and could not be downloaded ({error}); "
            "put torchvision's files there, or use a machine with network access"
        ) from error
