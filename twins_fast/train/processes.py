"""The processes that train or measure together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from twins_fast.ops.group import Group, all_true, average_, together

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This one, and how many there are; with one, every method is what it does alone."""

    rank: int = 0
    count: int = 1
    rank_here: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        """The first one alone writes files and talks."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Of those on this machine."""
        return self.rank_here == 0

    @property
    def group(self) -> Group:
        return "world" if self.count > 1 else None

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Of each value over all processes, which have the same names."""
        if self.count == 1:
            return values
        tensor = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        average_([tensor], "world")
        return dict(zip(sorted(values), tensor.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return flag if self.count == 1 else not all_true(torch.tensor(not flag), "world")

    def wait(self) -> None:
        """Until all of them are here."""
        if self.count > 1:
            with together():
                dist.barrier()

    def of_first(self, value: T) -> T:
        """What the first one has."""
        if self.count == 1:
            return value
        box = [value]
        with together():
            dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Processes()


def part_of(items: Sequence[T], processes: Processes) -> Sequence[T]:
    """An equal part for each process, in order."""
    length = len(items) // processes.count
    return items[processes.rank * length : (processes.rank + 1) * length]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Inside the block the processes that torchrun has started can talk to each other. Without it there is one.

    On GPUs each takes that of its number on its machine, which is what the device ``cuda`` means then.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ALONE
        return
    rank_here = int(os.environ["LOCAL_RANK"])
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank_here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), count, rank_here)
    finally:
        dist.destroy_process_group()
