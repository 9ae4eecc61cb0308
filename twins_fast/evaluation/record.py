"""What is known already: a line for each stage of an attack on a batch, kept so that a kill loses no other."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twins_fast.checkpoints.write import naming, write_atomically
from twins_fast.json_text import parse


@dataclass(frozen=True)
class Outcome:
    """What a stage made of a batch.

    Attributes:
        right: bool [n], on the CPU: the images that it and the stages before it have left; of those that it was to
            attack, which the network still gets right.
        loss: sums of the cross-entropy over the images that it attacked, clean and adversarial.
        attacked: how many these are.
        seconds: it took.
        images: adversarial, [n, C, H, W] on the CPU, of all stages so far, if they are kept.
    """

    right: Tensor
    loss: tuple[float, float]
    attacked: int
    seconds: float
    images: Tensor | None = None


class Record:
    """Outcomes by key; with a file, those of earlier processes, too.

    A key is the digest of all that the outcome depends on, so that nothing has to be thrown away when something else
    is evaluated, and several processes may write into one file. A line that a kill or a full disk cut short is left
    out.

    Args:
        path: the file, a line of JSON for each outcome; None to keep them in memory alone.
        images: a folder for the images of outcomes, a file each; None to keep them in memory.
        again: whether what the file holds is not to be used.
    """

    def __init__(self, path: str | Path | None = None, images: str | Path | None = None, again: bool = False):
        self._path = None if path is None else Path(path)
        self._images = None if images is None else Path(images)
        self._outcomes: dict[str, Outcome] = {}
        if self._path is None or not self._path.exists():
            return
        text = self._path.read_bytes()
        if text and not text.endswith(b"\n"):
            self._append(b"\n")  # so that the next line is whole
        for line in () if again else text.split(b"\n"):
            try:
                key, outcome = _read(parse(line))
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            self._outcomes[key] = outcome

    def get(self, key: str) -> Outcome | None:
        """What is known; without images if there are none."""
        outcome = self._outcomes.get(key)
        if outcome is not None and self._images is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with the file
                return replace(outcome, images=torch.from_numpy(np.load(self._images / f"{key}.npy")))
        return outcome

    def add(self, key: str, outcome: Outcome, about: str) -> None:
        """Keep an outcome; ``about`` is for people.

        Raises:
            OSError: it cannot be written; the file is named.
        """
        if self._images is not None and outcome.images is not None:
            self._images.mkdir(parents=True, exist_ok=True)
            array = io.BytesIO()
            np.save(array, outcome.images.numpy())
            write_atomically(self._images / f"{key}.npy", array.getvalue())  # first: the line says that it is there
            outcome = replace(outcome, images=None)
        if self._path is not None:
            self._append((json.dumps({"key": key, "about": about, **_plain(outcome)}) + "\n").encode())
        self._outcomes[key] = outcome

    def _append(self, data: bytes) -> None:
        assert self._path is not None
        with naming(self._path), self._path.open("ab", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())


def digest(*parts: Any) -> str:
    """A name for texts, tensors and networks: different ones have different names."""
    seen = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part):
            seen.update(len(piece).to_bytes(8, "little"))
            seen.update(piece)
    return seen.hexdigest()


def _pieces(part: Any) -> Iterable[bytes]:
    if isinstance(part, nn.Module):
        yield repr(part).encode()
        for name, value in part.state_dict().items():
            yield name.encode()
            yield from _pieces(value)
    elif isinstance(part, Tensor):
        yield f"{part.dtype} {list(part.shape)}".encode()
        yield part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        yield str(part).encode()


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "images": len(outcome.right),
        "right": np.packbits(outcome.right.numpy()).tobytes().hex(),
        "loss": list(outcome.loss),
        "attacked": outcome.attacked,
        "seconds": round(outcome.seconds, 3),
    }


def _read(line: dict[str, Any]) -> tuple[str, Outcome]:
    bits, images = np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8)), int(line["images"])
    if not 0 <= images <= len(bits):
        raise ValueError("another number of images")
    before, after = map(float, line["loss"])
    right = torch.from_numpy(bits[:images].astype(bool))
    return str(line["key"]), Outcome(right, (before, after), int(line["attacked"]), float(line["seconds"]))
