"""Reading checkpoint files without running anything that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from twins_fast.checkpoints.explain import explain, first_sentence
from twins_fast.checkpoints.formats import file_format, loadable, not_a_checkpoint
from twins_fast.checkpoints.names import CheckpointError, canonical, listed
from twins_fast.json_text import parse

_scalar = np.float64(0).__reduce__()[0]  # its module was renamed in NumPy 2: files hold either name
_NUMPY_SCALARS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *((type(np.dtype(code)), f"numpy.dtypes.{type(np.dtype(code)).__name__}") for code in "?bhilqBHILQefd"),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the network out of a checkpoint file, without running anything the file holds.

    Reads safetensors, and PyTorch files (zip and legacy, pickle protocols 2 to 5) with a state dict at the top or
    under ``model`` or ``state_dict``: the robustness library's, the published TWINS code's, this package's.

    Returns:
        CPU tensors under canonical names: the prefixes ``module.``, ``model.``, ``attacker.`` and
        ``_orig_mod.`` are stripped; the attacker's duplicates, its normaliser and optimiser entries
        are dropped. ``mean`` and ``std`` of a network that has them itself stay.

    Raises:
        CheckpointError: empty, truncated or not a checkpoint, a directory among them; no tensors in it; or a
            pickle that asks for anything but tensors, containers and NumPy scalars.
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
    meta = read_meta(path)
    return _read_safetensors(path)[0], meta


def read_meta(path: str | Path) -> dict[str, Any]:
    """The meta data that :func:`load_checkpoint` returns, without reading the tensors; errors as there."""
    if file_format(path) != "safetensors":
        raise not_a_checkpoint(path, "not a safetensors file, which twins-fast writes")
    _, metadata = _read_safetensors(path, tensors=False)
    try:
        return parse(metadata["meta"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no meta data of a twins-fast checkpoint") from error


def _read_safetensors(path: str | Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else ()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:
        raise not_a_checkpoint(path, f"as safetensors, {first_sentence(error)}") from error


def _read_pickled(path: str | Path):
    others = torch.serialization.get_safe_globals()  # what somebody else in this process trusts is not trusted here
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(loadable(path), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged stream can raise anything, OSError included
        # not chained: PyTorch's own message advises to switch the check off
        raise explain(path, error) from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


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
        raise CheckpointError(f"{path}: holds no tensors; its keys are {listed(content)}")
    for name, value in entries.items():
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is not an ordinary dense tensor")
    return entries
