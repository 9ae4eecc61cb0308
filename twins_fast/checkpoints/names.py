"""Names of entries: canonical without the prefixes of wrappers, and those of the two wings.

Entries of a two-wing batch norm are named as in the published code: ``bn1.weight`` is the adaptive
wing, ``bn1.main_bn.weight`` the frozen one.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit."""


_WRAPPERS = re.compile(r"(?:(?:module|model|attacker|_orig_mod)\.)*")
# normaliser buffers of the robustness library's wrapper; what else this package's own training checkpoints hold
_NOT_NETWORK = re.compile(
    r"(?:normalizer|normalize)\.(?:new_)?(?:mean|std)|(?:momentum|unaveraged|gradients|low_rank_branch)\..*"
)


def canonical(entries: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The network among ``entries``, without prefixes; ``path`` is for messages."""
    network: dict[str, Tensor] = {}
    attackers: dict[str, Tensor] = {}
    for name, value in entries.items():
        short = _WRAPPERS.sub("", name, count=1)  # which matches at the start, if only nothing
        prefix = name.removesuffix(short)
        if _NOT_NETWORK.fullmatch(short):
            continue
        group = attackers if "attacker." in prefix else network
        if short in group:
            raise CheckpointError(f"{path}: two entries are named {short} once prefixes are stripped")
        group[short] = value
    if not network and not attackers:
        raise CheckpointError(f"{path}: holds no network; its keys are {listed(entries)}")
    return {**attackers, **network}


def listed(keys: Iterable[object]) -> str:
    """Keys of whatever a file holds, for a message: in bounds however many, long or deeply nested they are."""
    short = reprlib.Repr()
    short.maxstring = 100
    shown = [short.repr(key) for key in itertools.islice(keys, 30)]
    return ", ".join(shown) or "none"


def covered(name: str, prefixes: Iterable[str]) -> bool:
    """Whether ``name`` is one of the entries or lies in one of the modules."""
    return any(f"{name}.".startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def layer_of(name: str) -> str:
    """``layer1.bn1.weight`` -> ``layer1.bn1``."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """``layer1.bn1.weight`` -> ``weight``."""
    return name.rpartition(".")[2]


def is_frozen(name: str) -> bool:
    """Whether it is an entry of a frozen wing."""
    return leaf_of(layer_of(name)) == "main_bn"


def plain_name(name: str) -> str:
    """``bn1.main_bn.weight`` -> ``bn1.weight``."""
    return ".".join(filter(None, (layer_of(layer_of(name)), leaf_of(name)))) if is_frozen(name) else name


def frozen_name(name: str) -> str:
    """``bn1.weight`` -> ``bn1.main_bn.weight``."""
    return ".".join(filter(None, (layer_of(name), "main_bn", leaf_of(name))))
