"""Seeds that a run draws from its own."""

from __future__ import annotations

import hashlib
import struct


def derived_seed(purpose: str, *parts: int) -> int:
    """A 63-bit seed that is well mixed from what it is for and a few integers of at most 64 bits (BLAKE2b).

    Different arguments never stand for the same bytes, so that no two draws of a run share a seed but by accident.
    """
    content = purpose.encode() + b"\0" + struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
