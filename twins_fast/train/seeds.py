"""Seeds that a run draws from its own."""

from __future__ import annotations

import numpy as np


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that is well mixed from a few integers >= 0 (SeedSequence of NumPy)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
