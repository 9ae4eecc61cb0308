"""Pickle streams: parsed, never run."""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_LONGEST_NAME = 1000


class ComputedNameError(pickle.UnpicklingError):
    """An import under a name that is not written out in the pickle."""


def imports(stream: IO[bytes]) -> Iterator[str]:
    """What the pickle at the stream's position asks to import; the position is left behind its end.

    Raises:
        Exception: what it is no pickle for, after the imports before that place.
    """
    for operation in protocol_2(stream):
        if operation[:1] in (pickle.GLOBAL, pickle.INST):
            yield operation[1:-1].decode(errors="replace").replace("\n", ".")


def protocol_2(stream: IO[bytes]) -> Iterator[bytes]:
    """Spell the pickle at the stream's position, of any protocol, with operations of protocol 2.

    What plain data is made of is translated, everything else passed on: whoever unpickles the result decides about
    it, imports included. Sets become lists, since protocol 2 cannot fill a set.

    Args:
        stream: can seek; its position is left behind the pickle's end.

    Raises:
        ComputedNameError: an import under a name that is not written out.
        Exception: it is no pickle, or damaged.
    """
    memo: dict[int, str | None] = {}  # key -> the string there, None for anything else
    dropped: set[int] = set()  # keys whose string the result does not hold, as only imports took it so far
    held: list[_Text] = []  # up to two strings on top of the stack, not written yet: an import may take them
    for opcode, argument, start in pickletools.genops(stream):
        name = opcode.name
        is_get = name in ("BINGET", "LONG_BINGET")
        is_put = name in ("BINPUT", "LONG_BINPUT", "MEMOIZE")
        if name in _STRINGS or (is_get and memo.get(argument) is not None):
            if len(held) == 2:
                yield from held.pop(0).written(dropped)
            held.append(_Text(memo[argument], argument) if is_get else _Text(argument))
            continue
        if is_put and held:
            key = len(memo) if argument is None else argument
            memo[key] = held[-1].text
            held[-1].keys.append(key)
            continue
        if name == "STACK_GLOBAL":
            if len(held) < 2 or any("\n" in text.text or len(text.text) > _LONGEST_NAME for text in held):
                raise ComputedNameError("it computes the name of an import")
            yield _global(*(text.text for text in held))
            dropped.update(held[0].keys, held[1].keys)
            held.clear()
            continue
        for text in held:
            yield from text.written(dropped)
        held.clear()
        if is_put:
            key = len(memo) if argument is None else argument
            memo[key] = None
            dropped.discard(key)
            yield _numbered(pickle.LONG_BINPUT, key)
        elif is_get:
            yield _numbered(pickle.LONG_BINGET, argument)
        elif name in _BYTES:
            yield from _bytes(argument)
        elif name == "BYTEARRAY8":
            yield _global("builtins", "bytearray")
            yield from _bytes(bytes(argument))
            yield pickle.TUPLE1 + pickle.REDUCE
        elif name == "EMPTY_SET":
            yield pickle.EMPTY_LIST
        elif name == "ADDITEMS":
            yield pickle.APPENDS
        elif name == "FROZENSET":
            yield _global("builtins", "frozenset")  # refused by that name, as in a file of protocol 2
        elif name == "PROTO":
            yield pickle.PROTO + b"\2"
        elif name != "FRAME":
            yield _between(stream, start, stream.tell())


@dataclass
class _Text:
    """A string on the stack."""

    text: str
    source: int | None = None  # the memo's key it was got from
    keys: list[int] = field(default_factory=list)  # those it was put under

    def written(self, dropped: set[int]) -> Iterator[bytes]:
        keys = self.keys
        if self.source is None or self.source in dropped:
            yield _string(self.text)
            keys = keys if self.source is None else [self.source, *keys]
        else:
            yield _numbered(pickle.LONG_BINGET, self.source)
        for key in keys:
            dropped.discard(key)
            yield _numbered(pickle.LONG_BINPUT, key)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("utf-8", "surrogatepass")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return _numbered(pickle.BINUNICODE, len(data)) + data


def _bytes(data: bytes) -> Iterator[bytes]:
    """As Python's own pickler writes bytes with protocol 2."""
    yield _global("_codecs", "encode")
    yield _string(data.decode("latin1")) + _string("latin1") + pickle.TUPLE2 + pickle.REDUCE


def _numbered(operation: bytes, number: int) -> bytes:
    return operation + struct.pack("<I", number)


def _between(stream: IO[bytes], start: int, end: int) -> bytes:
    stream.seek(start)
    return stream.read(end - start)
