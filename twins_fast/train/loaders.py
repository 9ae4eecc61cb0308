"""Batches of float images [B, 3, H, W] in [0, 1], in an order and augmentation that depend on the seed alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2

from twins_fast.train.datasets import DataError
from twins_fast.train.processes import ALONE, Processes, part_of
from twins_fast.train.seeds import derived_seed
from twins_fast.validation import check_choice, check_not_negative

MIN_BATCH = 4  # a last batch smaller than this is left out: its adaptive half may lack batch statistics

AUGMENTATIONS = {
    "none": (),
    "cifar": (v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()),
    "high-resolution": (v2.Resize(256), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()),
}


class Loaders(NamedTuple):
    """Batches of (images [B, 3, H, W] float32 in [0, 1], labels [B] int64)."""

    train: DataLoader
    validation: DataLoader | None
    test: DataLoader
    source: DataLoader | None = None  # of the pre-training, for methods that go on with it


def loaders(
    train: Dataset,
    test: Dataset,
    *,
    source: Dataset | None = None,
    batch_size: int,
    augmentation: str = "cifar",
    validation_part: float = 0.0,
    evaluation_images: int = 0,
    seed: int = 0,
    workers: int = 0,
    processes: Processes = ALONE,
) -> Loaders:
    """The data loaders of a run.

    Args:
        train, test: data sets of (PIL image or [H, W, 3] uint8 array, label).
        source: the same of the pre-training, if they are needed.
        batch_size: images of a batch, of all processes together.
        augmentation: of training images, a key of :data:`AUGMENTATIONS`.
        validation_part: of the training images, in [0, 1): set apart for validation; 0 for none.
        evaluation_images: how many of the validation and of the test images are used; 0 for all.
        seed: order, augmentation and the choice of images depend on it.
        workers: processes that load images; 0 loads them in this process.
        processes: that train together. Each gets an equal part of every training batch, and whole batches of the
            others.

    Raises:
        DataError: images that the augmentation is not for, or too few of them.
        ValueError: a number or a name that makes no sense.
    """
    check_choice("augmentation", augmentation, AUGMENTATIONS)
    check_not_negative(validation_part=validation_part, evaluation_images=evaluation_images, seed=seed, workers=workers)
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if batch_size % processes.count or batch_size < MIN_BATCH * processes.count > MIN_BATCH:
        raise ValueError(
            f"batch_size must be a multiple of the {processes.count} processes, with at least {MIN_BATCH} images for "
            f"each, got {batch_size}"
        )
    if validation_part >= 1:
        raise ValueError(f"validation_part must be less than 1, got {validation_part}")
    if augmentation == "cifar" and len(train):
        height, width = np.asarray(train[0][0]).shape[:2]
        if (height, width) != (32, 32):
            raise DataError(
                f"augmentation 'cifar' is for 32 x 32 pixels, but the images have {height} x {width}; "
                "'high-resolution' is for photographs"
            )

    def loader(kind: str, data: Dataset, transform: Callable, seed: int = seed) -> DataLoader:
        if kind != "training" and 0 < evaluation_images < len(data):
            data = Subset(data, _chosen(len(data), evaluation_images, "evaluation", seed)[0])
        batches = EpochBatches(len(data), batch_size, seed, shuffle=kind == "training", processes=processes)
        if len(data) == 0 or (kind == "training" and len(batches) == 0):
            least = MIN_BATCH if kind == "training" else 1
            raise DataError(f"the {kind} set has {len(data)} images; at least {least} needed")
        return DataLoader(
            Augmented(data, transform, seed),
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_trainer,
        )

    as_tested, validation = eval_transform(augmentation), None
    if validation_part:
        apart, rest = _chosen(len(train), round(validation_part * len(train)), "validation", seed)
        validation = loader("validation", Subset(train, apart), as_tested)
        train = Subset(train, rest)
    augmented = train_transform(augmentation)
    return Loaders(
        loader("training", train, augmented),
        validation,
        loader("test", test, as_tested),
        None if source is None else loader("training", source, augmented, derived_seed("source", seed)),
    )


def from_step(batches: DataLoader, step: int) -> Iterator[list[Tensor]]:
    """The batches of all epochs without end, from number ``step`` on."""
    epoch, first = divmod(step, len(batches))
    while True:
        batches.batch_sampler.epoch, batches.batch_sampler.first = epoch, first
        yield from batches
        epoch, first = epoch + 1, 0


def _chosen(size: int, count: int, purpose: str, seed: int) -> tuple[list[int], list[int]]:
    """``count`` random indices below ``size``, and the others, both ascending."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(purpose, seed)))
    return order[:count].sort()[0].tolist(), order[count:].sort()[0].tolist()


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Signals to a group of processes reach every one of them, but the trainer is to finish its step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
            torch.manual_seed(derived_seed("augmentation", self.seed, epoch, index))
            return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)`` keys; each epoch's order depends on (seed, epoch) alone.

    Shuffled ones are the same batches for any number of processes, of which each has an equal part: where the last one
    has too few images for that, it is filled up from the beginning of the order. The others are given out whole.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool, processes: Processes = ALONE):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.processes = processes
        self.epoch = 0
        self.first = 0  # batches to skip, when a run is resumed in the middle of an epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.size, self.batch_size)
        if self.shuffle:
            return whole + (rest >= MIN_BATCH)
        return len(range(self.processes.rank, whole + (rest > 0), self.processes.count))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = range(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed("order", self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first, len(self)):
            number = batch if self.shuffle else self.processes.rank + batch * self.processes.count
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            if self.shuffle and self.processes.count > 1:
                chosen = part_of(self._filled(chosen, order), self.processes)
            yield [(self.epoch, index) for index in chosen]

    def _filled(self, chosen: list[int], order: list[int]) -> list[int]:
        """With images from the beginning of the order, so that every process has as many, and enough."""
        count = self.processes.count
        missing = max(MIN_BATCH * count - len(chosen), -len(chosen) % count)
        return chosen + list(islice(cycle(order), missing))
