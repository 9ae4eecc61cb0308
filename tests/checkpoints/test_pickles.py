"""Pickles of protocols 3 to 5: read like those of protocol 2, and as little of them run."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoints.helpers import FORMATS, Body, assert_same, file_with_pickle, save
from twins_fast.checkpoints import CheckpointError, read_state_dict
from twins_fast.checkpoints.pickles import imports, protocol_2

NEWER = pytest.mark.parametrize("protocol", [3, 4, 5])
OLD_OPERATIONS = set(pickle.dumps([1.5, {"a": (None, True)}], 2))


def rewritten(content, protocol: int, **options) -> bytes:
    return b"".join(protocol_2(io.BytesIO(pickle.dumps(content, protocol, **options))))


@NEWER
def test_plain_data_is_the_same_in_protocol_2(protocol):
    shared, text = [1], "collections"
    content = {
        "numbers": [0, 255, 65536, -1, 2**40, 1.5, True, None],
        "texts": ["", "ü" * 300, text, "OrderedDict", text, "\ud800", "a\nb"],
        "bytes": [b"", b"\0\xff" * 200, bytearray(b"ab\xff"), bytearray()],
        "shared": [shared, shared, (shared, shared)],
        "import": [OrderedDict, OrderedDict(a=1), text, OrderedDict, "OrderedDict", nn.Parameter, torch.float16],
        "many": list(range(3000)),
        "names": {f"layer{i}.weight": f"layer{i}" for i in range(300)},
        "scalar": np.float32(0.5),
    }
    data = rewritten(content, protocol)
    assert data.startswith(b"\x80\2")
    read = pickle.loads(data)
    assert read == content
    assert read["shared"][0] is read["shared"][1] is read["shared"][2][0]
    assert read["texts"][2] is read["texts"][4]


@NEWER
def test_sets_become_lists(protocol):
    read = pickle.loads(rewritten([set(), {1, 2}, set(range(3000))], protocol))
    assert list(map(set, read)) == [set(), {1, 2}, set(range(3000))]


def test_memo_keys_that_are_used_again():
    a, b, name = b"\x8c\1a", b"\x8c\1b", b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93"
    for body in (
        b"(" + a + b"q\0" + b + b"q\0h\0t.",  # "b" replaces "a" under a key
        b"(" + name + b"h\0h\1h\0h\1h\1t.",  # strings that an import took are wanted later
        b"(" + name + b"h\0h\1\x93h\0h\1\x93h\0h\0t.",
        b"(" + name + a + b"q\0h\0h\0t.",
        b"(" + name + b"h\0" + b + b"q\0h\0h\0t.",
        b"(" + a + b"\x94\x94" + b + b"\x94h\0h\1h\2t.",
        b"(" + name + b"q\0h\0t.",  # an import replaces a string
    ):
        data = b"\x80\4" + body
        assert pickle.loads(b"".join(protocol_2(io.BytesIO(data)))) == pickle.loads(data)


@FORMATS
@NEWER
def test_reads_parameters_shared_tensors_and_views(tmp_path, zipped, protocol):
    model = Body(own_statistics=True)
    state = model.state_dict(keep_vars=True)
    state["view"], state["same"], state["half"] = (
        state["fc.weight"].data[:2, 1:],
        state["fc.weight"],
        torch.ones(3).half(),
    )
    extra = {
        "sets": [{1}, set()],
        "bytes": b"\0\xff",
        "bytearray": bytearray(b"a"),
        "dtype": torch.float64,
        "text": "fc.weight",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_state_dict(save(tmp_path, {"args": extra, "state_dict": state}, zipped, protocol))
    assert_same(read, {name: value.detach() for name, value in state.items()})


@NEWER
def test_reads_zip_files_without_checksums(tmp_path, protocol):
    state = Body().state_dict()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, state, protocol=protocol)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_state_dict(path), state)


def test_protocol_2_is_left_to_pytorch(tmp_path, monkeypatch):
    handed, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: (handed.append(file), load(file, **options))[1])
    for zipped in (True, False):
        path = save(tmp_path, Body().state_dict(), zipped)
        read_state_dict(path)
        assert handed.pop() == path


def stack_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def hostile(marker: str) -> dict[str, tuple[bytes, str]]:
    """Bodies of pickles that would touch ``marker``, and what must be said of them."""
    command = f"touch {marker}".encode()
    argument = b"X" + struct.pack("<I", len(command)) + command
    system = stack_global("os", "system")
    return {
        "global": (b"cos\nsystem\n" + argument + b"\x85R.", "'os.system'"),
        "stack global": (system + argument + b"\x85R.", "'os.system'"),
        "memoized names": (b"\x8c\2os\x940\x8c\6system\x940h\0h\1\x93" + argument + b"\x85R.", "'os.system'"),
        "inst": (b"(" + argument + b"ios\nsystem\n.", "'os.system'"),
        "obj": (b"(" + system + argument + b"o.", "'os.system'"),
        "newobj": (system + argument + b"\x85\x81.", "'os.system'"),
        "newobj_ex": (system + argument + b"\x85}\x92.", "'os.system'"),
        "build": (
            stack_global("functools", "partial") + b")\x81" + system + argument + b"\x85}Nt0b.",
            "functools.partial",
        ),
        "eval": (stack_global("builtins", "eval") + argument + b"\x85R.", "builtins.eval"),
        "getattr": (stack_global("builtins", "getattr") + argument + b"\x85R.", "builtins.getattr"),
        "python 2 eval": (stack_global("__builtin__", "eval") + argument + b"\x85R.", "builtins.eval"),
        "through an allowed module": (
            stack_global("torch", "serialization.os.system") + argument + b"\x85R.",
            "os.system",
        ),
        "through an allowed name": (
            stack_global("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
            "torch._utils._rebuild_tensor_v2.__globals__",
        ),
        "a method of an allowed class": (
            stack_global("collections", "OrderedDict.fromkeys") + b")R.",
            "OrderedDict.fromkeys",
        ),
        "an object array": (stack_global("numpy._core.multiarray", "_reconstruct") + b")R.", "multiarray._reconstruct"),
        "computed name": (
            b"\x8c\2os\x8c\6system\x86\x940h\0\x93" + argument + b"\x85R.",
            "computes the name of an import",
        ),
        "name behind a call": (
            b"\x8c\2osc_codecs\nencode\n\x8c\6systemX\5\0\0\0ascii\x86R\x93" + argument + b"\x85R.",
            "computes the name of an import",
        ),
        "line break in a name": (stack_global("collections\nOrderedDict\ncos", "system") + b".", "computes the name"),
        "extension 1": (b"\x82\xf0" + argument + b"\x85R.", "EXT1"),
        "extension 2": (b"\x83\xf0\0" + argument + b"\x85R.", "EXT2"),
        "extension 4": (b"\x84\xf0\0\0\0" + argument + b"\x85R.", "EXT4"),
        "out of band": (b"\x97\x98.", "NEXT_BUFFER"),
        "persistent": (argument + b"Q.", "persistent"),
        "call of what is no import": (argument + b")R.", "unrecognized function"),
        "new of what is no import": (argument + b")\x81.", "new object"),
        "state of what is no tensor": (b"]}b.", "build"),
        "items for no list": (b"}(K\1e.", "lists"),
        "items for no dict": (b"](K\1K\1u.", "dict"),
    }


@FORMATS
@NEWER
@pytest.mark.parametrize("name", hostile(""))
def test_what_only_a_hostile_pickle_does_is_refused(tmp_path, zipped, protocol, name):
    marker = tmp_path / "ran"
    body, said = hostile(str(marker))[name]
    copyreg.add_extension(os.system.__module__, "system", 0xF0)
    try:
        with pytest.raises(CheckpointError) as caught:
            read_state_dict(file_with_pickle(tmp_path, b"\x80" + bytes([protocol]) + body, zipped))
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 0xF0)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_hostile_pickles_run_elsewhere(tmp_path):
    for name in ("global", "stack global", "inst", "obj"):
        marker = tmp_path / name.replace(" ", "_")
        pickle.loads(b"\x80\4" + hostile(str(marker))[name][0])
        assert marker.exists()


HUGE = {
    "binunicode": b"X" + b"\xff" * 4,
    "binunicode8": b"\x8d" + struct.pack("<Q", 2**40),
    "binbytes": b"B" + b"\xff" * 4,
    "binbytes8": b"\x8e" + struct.pack("<Q", 2**62),
    "bytearray8": b"\x96" + struct.pack("<Q", 2**40),
    "frame": b"\x95" + struct.pack("<Q", 2**40) + b"N",
    "long4": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "memo key": b"Nr" + b"\xff" * 4 + b"N.",
    "get": b"j" + b"\xff" * 4 + b".",
}


@FORMATS
@NEWER
@pytest.mark.parametrize("name", HUGE)
def test_announced_sizes_are_not_believed(tmp_path, zipped, protocol, name):
    path = file_with_pickle(tmp_path, b"\x80" + bytes([protocol]) + HUGE[name], zipped)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_rewriting_takes_time_and_space_in_proportion():
    for body in (
        b"\x8c\xff" + b"a" * 255 + b"\x94\x8c\xff" + b"b" * 255 + b"\x94\x93" + b"h\0h\1\x93" * 20_000,
        b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"\x94" + b"h\0" * 200_000,
    ):
        data = b"\x80\4" + body + b"."
        size = sum(map(len, protocol_2(io.BytesIO(data))))
        assert size < 300 * len(data)


def test_a_compressed_archive_does_not_grow(tmp_path):
    path = tmp_path / "net.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\4" + b"N0" * 10**7 + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="larger than the file"):
            read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_imports_up_to_the_damage():
    stream = io.BytesIO(b"\x80\4" + stack_global("os", "system") + b"cshutil\nrmtree\n" + b"\xff")
    names = []
    with pytest.raises(ValueError):
        names.extend(imports(stream))
    assert names == ["os.system", "shutil.rmtree"]
