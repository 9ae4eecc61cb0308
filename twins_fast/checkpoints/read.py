"""Reading checkpoint files without running anything that they hold."""

from __future__ import annotations

import contextlib
import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from twins_fast.checkpoints.names import CheckpointError, canonical

_scalar = np.float64(0).__reduce__()[0]  # its module was renamed in NumPy 2: files hold either name
_NUMPY_SCALARS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *((type(np.dtype(code)), f"numpy.dtypes.{type(np.dtype(code)).__name__}") for code in "?bhilqBHILQefd"),
]
_ORDINARY_IMPORT = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
    r"|torch\._utils\._rebuild_\w+|torch\.(?:storage\.)?\w+Storage|torch\.nn\.parameter\.Parameter|torch\.Size"
)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the network out of a checkpoint file, without running anything the file holds.

    Reads safetensors, and PyTorch files (zip and legacy) with a state dict at the top or under
    ``model`` or ``state_dict``: the robustness library's, the published TWINS code's, this package's.

    Returns:
        CPU tensors under canonical names: the prefixes ``module.``, ``model.``, ``attacker.`` and
        ``_orig_mod.`` are stripped; the attacker's duplicates, its normaliser and optimiser entries
        are dropped. ``mean`` and ``std`` of a network that has them itself stay.

    Raises:
        CheckpointError: empty, truncated or not a checkpoint; no tensors in it; or a pickle that
            asks for anything but tensors, containers and NumPy scalars.
        OSError: the file cannot be opened.
    """
    if file_format(path) == "safetensors":
        return canonical(_read_safetensors(path)[0], path)
    return canonical(_network_entries(_read_pickled(path), path), path)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote: CPU tensors and the meta data, as JSON gives it back.

    Raises:
        CheckpointError: truncated, corrupt, or written by something else.
        OSError: the file cannot be opened.
    """
    tensors, metadata = _read_safetensors(path)
    try:
        return tensors, json.loads(metadata["meta"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: holds no meta data of a twins-fast checkpoint") from error


def file_format(path: str | Path) -> str:
    """``"safetensors"``, ``"torch zip"`` or ``"torch legacy"``, by content first; an empty file is an error."""
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head.startswith(b"PK"):
        return "torch zip"
    # safetensors: header length (8 bytes, little endian, far below 4 GiB), then a JSON object
    if Path(path).suffix == ".safetensors" or (head[4:8] == bytes(4) and head[8:] == b"{"):
        return "safetensors"
    return "torch legacy"


def _read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickled(path: str | Path):
    others = torch.serialization.get_safe_globals()  # what somebody else in this process trusts is not trusted here
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged stream can raise anything, OSError included
        # not chained: PyTorch's own message advises to switch the check off
        raise CheckpointError(f"{path}: {_explain(path, error)}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _explain(path: str | Path, error: Exception) -> str:
    """Why ``torch.load`` gave up, in one line."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"  # PyTorch leaves builtins unsaid
        names = [name]
    else:
        names = [name for name in _imports(path) if not _ORDINARY_IMPORT.fullmatch(name)]
    if names:
        return f"refused, nothing was run: the pickle asks for {', '.join(map(repr, dict.fromkeys(names)))}"
    if isinstance(error, EOFError | IndexError):
        return "not a readable checkpoint: the file ends early"
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Check the doc")]
    reason = re.split(r"\. (?=[A-Z])", lines[-1])[0].strip() if lines else "no reason given"
    return f"not a readable checkpoint: {type(error).__name__}: {reason}"


def _imports(path: str | Path) -> list[str]:
    """Names that the file's pickles ask to import, as far as they can be parsed."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # names before the damage are still worth naming
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith("data.pkl"):
                        _collect_imports(archive.open(member), names)
        else:
            with open(path, "rb") as file:
                for _ in range(5):  # legacy: number, version, system, object, storage keys; then raw data
                    _collect_imports(file, names)
    return names


def _collect_imports(stream: IO[bytes], names: list[str]) -> None:
    """Append the imports of the pickle at the stream's position, which is left behind its end."""
    pushed: list[str | None] = [None]
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            names.append(argument.replace(" ", ".", 1))
            pushed.append(None)
        elif opcode.name == "STACK_GLOBAL":  # protocol 4: module and name are the last two strings
            names.append(".".join(part or "?" for part in pushed[-2:]))
            pushed.append(None)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(argument))
        elif isinstance(argument, str):
            pushed.append(argument)


def _network_entries(content, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside what a PyTorch file holds."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a dict of tensors")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    entries = {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not entries:
        raise CheckpointError(f"{path}: holds no tensors; its keys are {', '.join(map(repr, content)) or 'none'}")
    for name, value in entries.items():
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is not an ordinary dense tensor")
    return entries
