"""Batches of float images [B, 3, H, W] in [0, 1], in an order and augmentation that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2

from twins_fast.train.datasets import DataError, ImageArray
from twins_fast.train.seeds import derived_seed
from twins_fast.validation import check_choice, check_not_negative

MIN_BATCH = 4  # a last batch smaller than this is left out: its adaptive half may lack batch statistics


AUGMENTATIONS = {
    "none": (),
    "cifar": (v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()),
    "high-resolution": (v2.Resize(256), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()),
}


def loaders(
    train: Dataset,
    test: Dataset,
    *,
    batch_size: int,
    augmentation: str = "cifar",
    test_images: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> tuple[DataLoader, DataLoader]:
    """Data loaders of (images [B, 3, H, W] float32 in [0, 1], labels [B] int64).

    Args:
        train, test: data sets of (PIL image or [H, W, 3] uint8 array, label).
        batch_size: images of a batch.
        augmentation: of training images, a key of :data:`AUGMENTATIONS`.
        test_images: how many of the test images, chosen by the seed; 0 for all.
        seed: order, augmentation and choice depend on it.
        workers: processes that load images; 0 loads them in this process.

    Raises:
        DataError: images that the augmentation is not for, or too few of them.
        ValueError: a number or a name that makes no sense.
    """
    check_choice("augmentation", augmentation, AUGMENTATIONS)
    check_not_negative(test_images=test_images, seed=seed, workers=workers)
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if augmentation == "cifar" and isinstance(train, ImageArray) and train.images.shape[1:3] != (32, 32):
        height, width = train.images.shape[1:3]
        raise DataError(f"augmentation 'cifar' is for 32 x 32 pixels, but the images have {height} x {width}")
    if test_images:
        generator = torch.Generator().manual_seed(derived_seed(seed))
        test = Subset(test, torch.randperm(len(test), generator=generator)[:test_images].sort()[0].tolist())

    def loader(kind: str, data: Dataset, transform: Callable, shuffle: bool) -> DataLoader:
        batches = EpochBatches(len(data), batch_size, seed, shuffle)
        if len(batches) == 0:
            raise DataError(f"the {kind} set has {len(data)} images; at least {MIN_BATCH if shuffle else 1} needed")
        return DataLoader(
            Augmented(data, transform, seed),
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    return (
        loader("training", train, train_transform(augmentation), shuffle=True),
        loader("test", test, eval_transform(augmentation), shuffle=False),
    )


def train_transform(augmentation: str) -> Callable:
    """Published augmentation, on PIL or uint8 images; pixels stay in [0, 1]."""
    return _transform(*AUGMENTATIONS[augmentation])


def eval_transform(augmentation: str) -> Callable:
    """Published test-time transform."""
    return _transform(*([v2.Resize(256), v2.CenterCrop(224)] if augmentation == "high-resolution" else []))


def _transform(*steps: Callable) -> Callable:
    return v2.Compose([v2.ToImage(), v2.RGB(), *steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


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
