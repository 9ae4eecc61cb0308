"""Where in the arena each tensor lies, and how to tell that memory ran out."""

from __future__ import annotations

import torch

from twins_fast.attacks.engine.plan import Slot


def place(sizes: list[int], slots: list[Slot], first: list[bool]) -> tuple[list[int], int]:
    """Offsets for slots of ``sizes`` bytes per image, such that no two that are live at once overlap; and the total.

    All sizes are proportional to the batch, so that one placement serves every batch. Greedy: largest slot first, into
    the lowest gap; but those that are ``first``, all live at once, lie side by side in front.
    """
    offsets = [0] * len(slots)
    placed: list[int] = []
    for index in sorted(range(len(slots)), key=lambda i: (not first[i], -sizes[i])):
        slot = slots[index]
        taken = sorted(
            (offsets[i], offsets[i] + sizes[i])
            for i in placed
            if slots[i].first <= slot.last and slot.first <= slots[i].last
        )
        offset = 0
        for begin, end in taken:
            if offset + sizes[index] <= begin:
                break
            offset = max(offset, end)
        offsets[index] = offset
        placed.append(index)
    return offsets, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text
    )
