"""The files that come with the package: real CIFAR-10 images, losslessly packed, and a robust network."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from twins_fast.checkpoints import write_atomically

FOLDER = Path(__file__).parent.parent / "assets"
NETWORK = FOLDER / "mini-source.safetensors"
_SHEET, _INDEX = "mini.webp", "mini.json"
_COLUMNS = 40


def read_images(folder: Path = FOLDER) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], int]:
    """Images [N, 32, 32, 3] uint8, labels [N] int64, class names, and how many of them are for training."""
    index = json.loads((folder / _INDEX).read_text())
    sheet = np.asarray(Image.open(folder / _SHEET).convert("RGB"))
    rows = sheet.shape[0] // 32
    tiles = sheet.reshape(rows, 32, _COLUMNS, 32, 3).swapaxes(1, 2).reshape(rows * _COLUMNS, 32, 32, 3)
    labels = np.array(index["labels"])
    return tiles[: len(labels)], labels, tuple(index["classes"]), index["train_images"]


def write_images(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], train_images: int, folder: Path
) -> None:
    """The inverse of :func:`read_images`: one lossless sheet of tiles, row by row, and an index."""
    rows = -(-len(images) // _COLUMNS)
    tiles = np.zeros((rows * _COLUMNS, 32, 32, 3), np.uint8)
    tiles[: len(images)] = images
    sheet = tiles.reshape(rows, _COLUMNS, 32, 32, 3).swapaxes(1, 2).reshape(rows * 32, _COLUMNS * 32, 3)
    packed = io.BytesIO()
    Image.fromarray(sheet).save(packed, "WEBP", lossless=True, quality=100, method=6)
    index = {"classes": list(classes), "train_images": train_images, "labels": labels.tolist()}
    write_atomically(folder / _SHEET, packed.getvalue())
    write_atomically(folder / _INDEX, json.dumps(index).encode())
