"""Which format a file has, and where the pickles of PyTorch's two formats lie."""

from __future__ import annotations

import contextlib
import io
import mmap
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from twins_fast.checkpoints.names import CheckpointError
from twins_fast.checkpoints.pickles import imports, protocol_2

_LEGACY_PICKLES = 5  # number, version, system, object, storage keys; then raw data
_NEWER_PROTOCOLS = (b"\x80\3", b"\x80\4", b"\x80\5")  # torch.load knows little of them


def file_format(path: str | Path) -> str:
    """``"safetensors"``, ``"torch zip"`` or ``"torch legacy"``, by content first.

    Raises:
        CheckpointError: an empty file, or a directory.
        OSError: the file cannot be opened.
    """
    if Path(path).is_dir():
        raise not_a_checkpoint(path, "it is a directory")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise not_a_checkpoint(path, "the file is empty")
    if head.startswith(b"PK"):
        return "torch zip"
    # safetensors: header length (8 bytes, little endian, far below 4 GiB), then a JSON object
    if Path(path).suffix == ".safetensors" or (head[4:8] == bytes(4) and head[8:] == b"{"):
        return "safetensors"
    return "torch legacy"


def not_a_checkpoint(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a checkpoint: {reason}")


def loadable(path: str | Path) -> str | Path | IO[bytes]:
    """What ``torch.load`` can read: the file, or a copy in memory whose newer pickles were brought to protocol 2.

    Raises:
        Exception: the newer pickles are damaged, or ask for what no tensor needs.
    """
    copy = io.BytesIO()
    if file_format(path) == "torch legacy":
        with _mapped(path) as file:
            if file[:2] not in _NEWER_PROTOCOLS:
                return path
            for _ in range(_LEGACY_PICKLES):
                copy.writelines(protocol_2(file))
            shutil.copyfileobj(file, copy)
    else:
        newer = _newer_members(path)
        if not newer:
            return path
        with _open_archive(path) as old, zipfile.ZipFile(copy, "w") as new:
            for info in old.infolist():
                with _open_member(old, info) as member:
                    data = member.read()
                if info.filename in newer:
                    data = b"".join(protocol_2(io.BytesIO(data)))
                new.writestr(info.filename, data)
    copy.seek(0)
    return copy


def imports_of(path: str | Path) -> list[str]:
    """Names that the pickles of a PyTorch file ask to import, as far as they can be parsed."""
    names: list[str] = []
    parsed = 0
    with contextlib.suppress(Exception):  # names before the damage are still worth naming
        for stream in _pickles(path):
            for name in imports(stream):
                names.append(name)
            parsed += 1
    with open(path, "rb") as file:
        head = file.read(2)
    declared = head == b"PK" or head.startswith(b"\x80")
    return names if declared or parsed else []  # any two lines of text that start with "c" look like an import


def _pickles(path: str | Path) -> Iterator[IO[bytes]]:
    """Streams at the start of each pickle; each must be read to the pickle's end."""
    if file_format(path) == "torch zip":
        with _open_archive(path) as archive:
            for info in _members_with_pickles(archive):
                yield io.BytesIO(_open_member(archive, info).read())
    else:
        with _mapped(path) as file:
            for _ in range(_LEGACY_PICKLES):
                yield file


def _mapped(path: str | Path) -> mmap.mmap:
    """The file as a stream that, other than a file, does not reserve memory for what it is asked for and lacks."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _newer_members(path: str | Path) -> list[str]:
    """The pickles of a zip file that are of a newer protocol."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: _open_member(archive, info) for info in _members_with_pickles(archive)}
            return [name for name, member in members.items() if member.read(2) in _NEWER_PROTOCOLS]
    except Exception:  # where zipfile gives up, PyTorch still decides
        return []


def _members_with_pickles(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [info for info in archive.infolist() if info.filename.endswith("data.pkl")]


def _open_archive(path: str | Path) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(path)
    if sum(info.file_size for info in archive.infolist()) > Path(path).stat().st_size:
        archive.close()
        raise zipfile.BadZipFile("its members are larger than the file")  # torch.save never compresses
    return archive


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    info.CRC = None  # not compared: torch.save can be told to leave checksums out, and torch.load ignores them
    return archive.open(info)
