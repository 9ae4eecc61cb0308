"""Processes that share their batch statistics."""

from __future__ import annotations

import torch.distributed as dist

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


def several_processes() -> bool:
    """Whether this process has others to talk to, in any group."""
    return dist.is_initialized() and dist.get_world_size() > 1


def member(group: dist.ProcessGroup | str) -> dist.ProcessGroup | None:
    """The group as ``torch.distributed`` takes it, where None is the default one."""
    return None if isinstance(group, str) else group
