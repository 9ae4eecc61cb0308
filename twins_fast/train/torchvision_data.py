"""Data sets of torchvision, parted into training and test images as in the literature on transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets as tv_datasets

from twins_fast.train.seeds import derived_seed


class NotThere(ValueError):
    """Neither in its folder nor to be downloaded."""


@dataclass(frozen=True)
class Source:
    """How a data set is parted: as it comes, or by random images of each class.

    Attributes:
        kind: torchvision's class.
        train: options of the parts that are the training images together.
        test: options of the test images.
        per_class: where the data set comes in one part, images of each class for training, and for testing; 0 for all
            others.
    """

    kind: type[Any]
    train: tuple[Mapping[str, Any], ...] = ({"split": "train"},)
    test: Mapping[str, Any] | None = None
    per_class: tuple[int, int] | None = None


_TEST = {"split": "test"}
# As parted by Kornblith et al. (arXiv 1805.08974) and Salman et al. (arXiv 2007.08489).
SOURCES = {
    "aircraft": Source(tv_datasets.FGVCAircraft, ({"split": "trainval"},), _TEST),
    "caltech101": Source(tv_datasets.Caltech101, per_class=(30, 0)),
    "caltech256": Source(tv_datasets.Caltech256, per_class=(60, 0)),
    "cars": Source(tv_datasets.StanfordCars, test=_TEST),
    "cifar10": Source(tv_datasets.CIFAR10, ({"train": True},), {"train": False}),
    "cifar100": Source(tv_datasets.CIFAR100, ({"train": True},), {"train": False}),
    "dtd": Source(tv_datasets.DTD, ({"split": "train"}, {"split": "val"}), _TEST),
    "flowers": Source(tv_datasets.Flowers102, ({"split": "train"}, {"split": "val"}), _TEST),
    "food": Source(tv_datasets.Food101, test=_TEST),
    "pets": Source(tv_datasets.OxfordIIITPet, ({"split": "trainval"},), _TEST),
    "sun397": Source(tv_datasets.SUN397, per_class=(50, 50)),
}


def read(name: str, root: Path, seed: int) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Training and test images, and the class names.

    Args:
        name: a key of :data:`SOURCES`.
        root: folder of torchvision's files, which are downloaded if they are not there.
        seed: chooses the images where the data set comes in one part.

    Raises:
        NotThere: they are not, and cannot be downloaded.
    """
    source = SOURCES[name]
    if source.per_class is None:
        parts = [_read(source.kind, root, options) for options in source.train]
        train = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        return train, _read(source.kind, root, source.test), _classes(parts[0])
    whole = _read(source.kind, root, {})
    labels = np.array(getattr(whole, "y", None) or whole._labels)
    files = getattr(whole, "_image_files", None)  # SUN397's come in the order of the disk
    known = np.arange(len(labels)) if files is None else np.argsort([str(file) for file in files])
    order = known[np.random.default_rng(derived_seed(name, seed)).permutation(len(labels))]
    first, second = source.per_class
    of_class = [order[labels[order] == label] for label in range(labels.max() + 1)]
    train = np.concatenate([own[:first] for own in of_class])
    test = np.concatenate([own[first : first + second if second else None] for own in of_class])
    return Subset(whole, sorted(train.tolist())), Subset(whole, sorted(test.tolist())), _classes(whole)


def _classes(data: Any) -> tuple[str, ...]:
    """Their names, or numbers where they have none (the flowers of torchvision 0.21)."""
    for attribute in ("categories", "classes"):
        if hasattr(data, attribute):
            return tuple(getattr(data, attribute))
    return tuple(map(str, range(max(data._labels) + 1)))


def _read(kind: type[Any], root: Path, options: Mapping[str, Any]) -> Any:
    try:
        return kind(str(root), **options)
    except Exception:  # whatever it says where something is missing
        try:
            return kind(str(root), download=True, **options)
        except Exception as error:
            raise NotThere(
                f"{kind.__name__} is not in {str(root)!r} and could not be downloaded ({error}); "
                "put torchvision's files there, or use a machine with network access"
            ) from error
