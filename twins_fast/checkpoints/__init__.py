"""Checkpoints: reading those of others without running them, loading into a network, saving that survives a kill.

Entries of a two-wing batch norm are named as in the published code: ``bn1.weight`` is the adaptive
wing, ``bn1.main_bn.weight`` the frozen one.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pickletools
import re
import secrets
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

WINGS = ("keep", "adaptive", "frozen", "twin")

_WRAPPERS = re.compile(r"(?:(?:module|model|attacker|_orig_mod)\.)*")
# normaliser buffers of the robustness library's wrapper; momentum of this package's own training checkpoints
_NOT_NETWORK = re.compile(r"(?:normalizer|normalize)\.(?:new_)?(?:mean|std)|momentum\..*")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")

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


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit."""


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
    if _file_format(path) == "safetensors":
        return _canonical(_read_safetensors(path)[0], path)
    return _canonical(_network_entries(_read_pickled(path), path), path)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_extra: Iterable[str] = (),
) -> None:
    """Load ``state`` into ``model``; names, shapes and kinds of dtype must agree.

    Floating-point entries are cast to the model's dtype.

    Args:
        model: receives the entries, on whatever device it is.
        state: entry name -> tensor.
        allow_missing: modules or entries (``"fc"`` covers ``fc.weight``, not ``fc_downstream.weight``)
            that the model keeps as they are when ``state`` lacks them.
        allow_extra: modules or entries of ``state`` that the model may lack.

    Raises:
        CheckpointError: lists all entries that are missing, extra, of another shape, floating point
            on one side only, or not finite. The model is unchanged then.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    problems = [f"missing: {name}" for name in sorted(missing) if not _covered(name, allow_missing)]
    problems += [f"extra: {name}" for name in sorted(extra) if not _covered(name, allow_extra)]
    shared = [name for name in own if name in state]
    problems += [f"{name}: {why}" for name in shared if (why := _mismatch(state[name], own[name]))]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: state[name] for name in shared}, strict=False)


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Start ``model`` from a pre-trained network; the head ``fc_downstream`` stays fresh.

    A two-wing model takes an ordinary checkpoint's batch norms into both wings; an ordinary model
    takes the adaptive wing of a two-wing checkpoint. The unused head ``fc`` may be absent on either
    side, and so may the input statistics ``mean`` and ``std``, unless they contradict the model's.

    Args:
        model: ordinary, or converted to two-wing layers.
        state: what :func:`read_state_dict` returns.

    Raises:
        CheckpointError: as in :func:`load_state`.
    """
    own, buffers = model.state_dict(), dict(model.named_buffers())
    body = {name: value for name, value in state.items() if not _covered(name, ("fc_downstream",))}
    layers_with_frozen_wing = {_layer(name) for name in body if _is_frozen(name)}
    for name in own:
        if _is_frozen(name) and _layer(name) not in layers_with_frozen_wing and _plain(name) in body:
            body[name] = body[_plain(name)]
    for name in list(body):
        if name in own:
            continue
        known_statistics = name in ("mean", "std") and name in buffers and _same_values(body[name], buffers[name])
        if known_statistics or (_is_frozen(name) and _plain(name) in own):
            del body[name]
    load_state(model, body, allow_missing=("fc", "fc_downstream", "mean", "std"), allow_extra=("fc",))


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: dict) -> None:
    """Write one safetensors file that holds ``tensors`` and ``meta``; a kill leaves the old one or the new one.

    ``<stem>.json`` beside it shows ``meta`` to people. It is written afterwards, and never read.

    Args:
        path: the file; its folder must exist.
        tensors: any device, layout in memory and sharing; written contiguous and apart.
        meta: whatever JSON can hold.

    Raises:
        TypeError: ``meta`` holds something that JSON cannot; nothing is written.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path}: the name ends in .json, which is the sidecar's")
    write_atomically(path, _serialize(tensors, meta))
    write_atomically(path.with_suffix(".json"), (json.dumps(meta, indent=2) + "\n").encode())


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
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


def convert_checkpoint(source: str | Path, target: str | Path, *, wings: str = "keep") -> dict:
    """Rewrite any supported checkpoint as safetensors with canonical names.

    Args:
        source: what :func:`read_state_dict` reads.
        target: the new file; an existing one is replaced.
        wings: ``"keep"`` changes nothing; ``"adaptive"`` and ``"frozen"`` make an ordinary network of
            that wing; ``"twin"`` makes two equal wings of every ordinary batch norm.

    Returns:
        ``{"entries", "parameters", "source_format", "wings"}``; ``parameters`` counts elements,
        running statistics and input statistics left out.

    Raises:
        CheckpointError: unreadable; without the wings asked for; or ``target`` is the source.
    """
    if wings not in WINGS:
        raise ValueError(f"wings must be one of {', '.join(WINGS)}, got {wings!r}")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise CheckpointError(f"{target}: the target is the source; choose another name")
    state = read_state_dict(source)
    try:
        state = _SELECT[wings](state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: cannot convert with wings={wings!r}: {error}") from None
    summary = {
        "entries": len(state),
        "parameters": sum(value.numel() for name, value in state.items() if _leaf(name) not in _BUFFERS),
        "source_format": _file_format(source),
        "wings": wings,
    }
    write_atomically(Path(target), _serialize(state, summary))
    return summary


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at any moment, kill and power cut included, it is either the old or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # same folder: a rename must not copy
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _remove_abandoned(path)


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


def _serialize(tensors: Mapping[str, Tensor], meta: dict) -> bytes:
    apart = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return safetensors.torch.save(apart, metadata={"meta": json.dumps(meta)})


def _file_format(path: str | Path) -> str:
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
    with contextlib.suppress(Exception):  # what was found before the damage is still worth naming
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
        raise CheckpointError(f"{path}: holds no tensors; the keys found are {', '.join(map(repr, content)) or 'none'}")
    for name, value in entries.items():
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is not an ordinary dense tensor")
    return entries


def _canonical(entries: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    network: dict[str, Tensor] = {}
    attackers: dict[str, Tensor] = {}
    for name, value in entries.items():
        prefix = _WRAPPERS.match(name)[0]
        short = name[len(prefix) :]
        if _NOT_NETWORK.fullmatch(short):
            continue
        group = attackers if "attacker." in prefix else network
        if short in group:
            raise CheckpointError(f"{path}: two entries are named {short} once prefixes are stripped")
        group[short] = value
    if not network and not attackers:
        raise CheckpointError(f"{path}: holds no network; the keys found are {', '.join(map(repr, entries)) or 'none'}")
    return {**attackers, **network}


def _mismatch(value: Tensor, own: Tensor) -> str | None:
    """What is wrong with loading ``value`` into ``own``."""
    if value.shape != own.shape:
        return f"shape {list(value.shape)} in the checkpoint, {list(own.shape)} in the model"
    if (value.is_floating_point(), value.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"{value.dtype} in the checkpoint, {own.dtype} in the model"
    if not torch.isfinite(value.to(own.dtype)).all():
        return f"NaN or infinite values (as {own.dtype})"
    return None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.allclose(a.flatten().cpu().float(), b.flatten().cpu().float())


def _covered(name: str, prefixes: Iterable[str]) -> bool:
    """Whether ``name`` is one of the entries or lies in one of the modules."""
    return any(f"{name}.".startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_frozen(name: str) -> bool:
    return _leaf(_layer(name)) == "main_bn"


def _plain(name: str) -> str:
    """``bn1.main_bn.weight`` -> ``bn1.weight``."""
    return ".".join(filter(None, (_layer(_layer(name)), _leaf(name)))) if _is_frozen(name) else name


def _frozen(name: str) -> str:
    """``bn1.weight`` -> ``bn1.main_bn.weight``."""
    return ".".join(filter(None, (_layer(name), "main_bn", _leaf(name))))


def _plain_bn_entries(state: Mapping[str, Tensor]) -> list[str]:
    """Adaptive-wing or ordinary entries of every batch norm: those beside a ``running_mean``."""
    layers = {_layer(name) for name in state if _leaf(name) == "running_mean"}
    return [name for name in state if _layer(name) in layers and not _is_frozen(name)]


def _adaptive_wing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = [name for name in state if _is_frozen(name)]
    _require(frozen, "it has no two-wing layers")
    _require_entries(state, [_plain(name) for name in frozen])
    return {name: value for name, value in state.items() if not _is_frozen(name)}


def _frozen_wing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = {_plain(name): value for name, value in state.items() if _is_frozen(name)}
    _require(frozen, "it has no two-wing layers")
    _require_entries(state, [_frozen(name) for name in _plain_bn_entries(state)])
    return {name: value for name, value in state.items() if not _is_frozen(name)} | frozen


def _twin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    _require(not any(map(_is_frozen, state)), "it has two wings already")
    plain = _plain_bn_entries(state)
    _require(plain, "it has no batch norm with running statistics")
    return state | {_frozen(name): state[name] for name in plain}


_SELECT = {"keep": dict, "adaptive": _adaptive_wing, "frozen": _frozen_wing, "twin": _twin}


def _require(condition, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _require_entries(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    lacking = [name for name in names if name not in state]
    _require(not lacking, f"it lacks {', '.join(lacking)}")
