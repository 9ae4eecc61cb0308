"""Why a PyTorch file is not read, in one line and without advice to switch a check off."""

from __future__ import annotations

import pickle
import pickletools
import re
import tarfile
import textwrap
import zipfile
from pathlib import Path

import torch

from twins_fast.checkpoints.formats import imports_of, not_a_checkpoint
from twins_fast.checkpoints.names import CheckpointError
from twins_fast.checkpoints.pickles import ComputedNameError

_ORDINARY_IMPORT = re.compile(
    r"collections\.(?:OrderedDict|Counter)|_codecs\.encode|(?:builtins|__builtin__)\.(?:set|bytearray|complex)"
    r"|numpy\.dtype|numpy\._?core\.multiarray\.scalar|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.(?:storage\.)?\w+Storage|torch\.nn\.parameter\.Parameter|torch\.(?:Size|Tensor|device)"
    r"|torch\.(?:bool|u?int|b?float|complex|q)\w*"
)
_OF_PYTORCH_2_6 = {  # which says no more
    (AssertionError, ""): "its pickle has a persistent id that is not a storage's",
    (IndexError, "list assignment index out of range"): "its pickle sets items of what is not a dict",
}
_PLEA = r"^Please file an issue .*? use case: WeightsUnpickler error: "  # before PyTorch's reason
_MAGIC = pickle.LONG1 + b"\n" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") + pickle.STOP
_ENDS_EARLY = re.compile("unexpected EOF|exhausted before|only .* remain|not enough data")  # PyTorch's, pickletools'
_MAGIC_WITHIN = 2 + 9 + len(_MAGIC)  # after the protocol, and a frame


def explain(path: str | Path, error: Exception) -> CheckpointError:
    """The error to raise for a PyTorch file that could not be read because of ``error``."""
    names = imports_of(path)
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and names:
        name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"  # PyTorch leaves builtins unsaid
        names = [name]
    else:
        names = [name for name in names if not _ORDINARY_IMPORT.fullmatch(name)]
    if names:
        asked = ", ".join(map(repr, dict.fromkeys(names)))
        return CheckpointError(f"{path}: refused, nothing was run: the pickle asks for {asked}")
    if isinstance(error, ComputedNameError):
        return CheckpointError(f"{path}: refused, nothing was run: {error}")
    return not_a_checkpoint(path, _reason(path, error))


def _reason(path: str | Path, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(_MAGIC_WITHIN)
    if head.startswith(b"PK"):
        return _reason_of_zip(path, error)
    if tarfile.is_tarfile(path):
        return "it is a tar archive"
    if not re.match(rb"\x80[\2-\5]", head):
        return "it is neither a zip archive nor a pickle nor safetensors"
    if _MAGIC not in head and len(head) >= _MAGIC_WITHIN:
        return "it is a pickle that torch.save did not write"
    return _damage(error)


def _reason_of_zip(path: str | Path, error: Exception) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except Exception:
        return "the zip archive is cut short or damaged"
    if not any(name.endswith("/data.pkl") for name in members):
        return "it is a zip archive that torch.save did not write"
    return _damage(error)


def _damage(error: Exception) -> str:
    if (type(error), str(error)) in _OF_PYTORCH_2_6:
        return _OF_PYTORCH_2_6[type(error), str(error)]
    if isinstance(error, EOFError | IndexError) or _ENDS_EARLY.search(str(error)):
        return "the file ends early"
    operation = re.search(r"Unsupported operand (\d+)", str(error))
    if operation:
        known = pickletools.code2op.get(chr(int(operation[1])))
        return (
            f"its pickle has {known.name if known else 'bytes without meaning'} in a place where no checkpoint has it"
        )
    return f"it is damaged: {type(error).__name__}: {first_sentence(error)}"


def first_sentence(error: Exception) -> str:
    """Of the message proper: without PyTorch's advice before and after it, and the C++ stack."""
    message = re.split(r"\n+(?:Exception raised from|frame #|Check the doc)", str(error))[0]
    lines = [line for line in message.splitlines() if line.strip()]
    sentence = re.split(r"\. (?=[A-Z])", lines[-1])[0] if lines else "no reason given"
    sentence = re.sub(rf"^\[enforce fail at .*?\] \. |{_PLEA}", "", sentence)
    return textwrap.shorten(sentence, 200)  # some quote the file
