"""Writing files that survive a kill."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write one safetensors file that holds ``tensors`` and ``meta``; a kill leaves the old one or the new one.

    ``<stem>.json`` next to it shows ``meta`` to people. It is written afterwards, and never read.

    Args:
        path: the file; its folder must exist.
        tensors: any device, layout in memory and sharing; written contiguous and apart.
        meta: whatever JSON can hold.

    Raises:
        TypeError: ``meta`` holds something that JSON cannot; nothing is written.
        ValueError: ``path`` ends in ``.json``.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path}: the name ends in .json, which is the sidecar's")
    write_atomically(path, serialize(tensors, meta))
    write_atomically(path.with_suffix(".json"), (json.dumps(meta, indent=2) + "\n").encode())


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at any moment, kill and power cut included, it is either the old or the new one.

    Raises:
        OSError: it cannot be written; ``path`` is named.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # same folder: a rename must not copy
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _remove_abandoned(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name this file: those of a full disk name none, others a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed writers of ``path`` left; a living writer's is not an hour old."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def serialize(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> bytes:
    """The content of a safetensors file, tensors on any device, ``meta`` as JSON."""
    apart = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return safetensors.torch.save(apart, metadata={"meta": json.dumps(meta)})
