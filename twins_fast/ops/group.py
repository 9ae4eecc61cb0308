"""Processes that share batch statistics or gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | str | None  # "world" is the default group, whenever it is made; None: no other process


def world_size(group: object) -> int:
    """Number of processes of a group that is not ``None``.

    Raises:
        TypeError: not a group.
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: this process is not in the group.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "process_group needs torch.distributed: call torch.distributed.init_process_group first, or leave it None"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group does not hold this process")
    if group == "world":
        return dist.get_world_size()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed group, 'world' or None, got {group!r}")
    return dist.get_world_size(group)


class ProcessLost(RuntimeError):
    """Another process of the group does not answer any more."""


@contextmanager
def together() -> Iterator[None]:
    """What stands inside needs all processes of a group.

    Raises:
        ProcessLost: one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's have no type of their own
        raise ProcessLost(f"another process of this run has ended ({str(error).splitlines()[0]})") from error


def average_(tensors: Sequence[Tensor], group: dist.ProcessGroup | str) -> None:
    """Give every process the mean over all of them, in place: a message for each dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for own in alike.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in own]) / world_size(group)
        with together():
            dist.all_reduce(flat, group=member(group))
        parts = flat.split([tensor.numel() for tensor in own])
        with torch.no_grad():
            torch._foreach_copy_(list(own), [part.view(t.shape) for part, t in zip(parts, own, strict=True)])


def all_true(flag: Tensor, group: dist.ProcessGroup | str) -> Tensor:
    """Whether it is true in every process, []."""
    count = flag.int()
    with together():
        dist.all_reduce(count, dist.ReduceOp.MIN, group=member(group))
    return count.bool()


def several_processes() -> bool:
    """Whether this process has others to talk to, in any group."""
    return dist.is_initialized() and dist.get_world_size() > 1


def member(group: dist.ProcessGroup | str) -> dist.ProcessGroup | None:
    """The group as ``torch.distributed`` takes it, where None is the default one."""
    return None if isinstance(group, str) else group
