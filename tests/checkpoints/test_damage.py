"""Files that were cut short or in which bytes were flipped: a clear error or a read, nothing else."""

from __future__ import annotations

import sys
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.helpers import Body, robustness_checkpoint, torch_bytes
from twins_fast.checkpoints import CheckpointError, read_state_dict

resource = pytest.importorskip("resource")  # POSIX

FORMATS = ["safetensors", *(f"{kind}{protocol}" for kind in ("zip", "legacy") for protocol in (2, 3, 4, 5))]
STRAY = torch.arange(4000.0)  # flips in plenty of raw data, too


def whole(kind: str) -> bytes:
    state = Body(classes=2).state_dict() | {"stray": STRAY}
    if kind == "safetensors":
        return safetensors.torch.save(state)
    return torch_bytes(robustness_checkpoint(state), kind.startswith("zip"), int(kind[-1]))


def peak_memory() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module", params=FORMATS)
def valid(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "net.ckpt"
    path.write_bytes(whole(request.param))
    read_state_dict(path)  # whatever is loaded once
    return path, path.read_bytes()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_harmless(valid, data):
    path, content = valid
    size = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))), label="size")
    damaged = bytearray(content[:size])
    # structure is at either end: where pickles, headers and the directory of a zip file are
    places = st.one_of(st.integers(0, size), st.integers(0, 2000), st.integers(size - 2000, size))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4), label="flips"):
        if 0 <= place < size:
            damaged[place] = value
    path.write_bytes(damaged)
    memory, start = peak_memory(), time.monotonic()
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and "weights_only" not in str(error)
    else:
        assert state and all(isinstance(name, str) and value.device.type == "cpu" for name, value in state.items())
        assert sum(value.numel() for value in state.values()) < len(content)
        if damaged == content:
            assert torch.equal(state["stray"], STRAY)
    assert time.monotonic() - start < 10
    assert peak_memory() - memory < 100e6
