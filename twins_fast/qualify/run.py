"""A device's checks, in processes of their own, and what comes of them."""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from twins_fast.ops.native import dtype_name
from twins_fast.qualify import process
from twins_fast.qualify.checks import DTYPES
from twins_fast.verdicts import FAILED, PACKAGE, QUALIFYING, UNKNOWN, Verdict, file_of, key_of, load, remember, save

# A check and the most seconds that it may take; most of that is Triton's compiler.
LIMITS = {"twin_batch_norm cuda": 120.0, "twin_batch_norm triton": 240.0, "plan": 420.0}
EXPECTED = "three to ten minutes"
# What would make a check take part in somebody's training, or run something else than it is about.
SCRUBBED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
            "TORCHELASTIC_RUN_ID", "TWINS_FAST_BACKEND", "TRITON_INTERPRET", "PYTHONSTARTUP")  # fmt: skip

Command = Callable[[str, torch.device], list[str]]


def check_command(check: str, device: torch.device) -> list[str]:
    """What runs a check on a device."""
    from twins_fast.qualify.__main__ import uuid_of

    return [sys.executable, "-m", "twins_fast.qualify", check, uuid_of(device.index or 0)]


def qualify(
    device: torch.device | str = "cuda",
    *,
    again: bool = False,
    say: Callable[[str], None] = print,
    command: Command = check_command,
) -> dict[str, Verdict]:
    """Find out, once for each model of device and set of software, whether our kernels are right and faster there.

    Every check runs in a process of its own with a limit, so that a crash or a hang of one is no more than its verdict.
    A check that ran out of time or memory says nothing: it is made again by the next call. One process of a machine
    does the checks, others wait for it.

    Args:
        device: a CUDA device.
        again: make the checks even if there are verdicts.
        say: is given a line of progress at a time.
        command: what runs a check.

    Returns:
        subject, such as ``"plan bfloat16"``, -> verdict; this process uses them from now on.

    Raises:
        ValueError: no CUDA device.
        RuntimeError: inside of a check.
    """
    if os.environ.get(QUALIFYING):
        raise RuntimeError("a check of a device cannot start another one")
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"{device} is no CUDA device that PyTorch can use; only those need a verdict")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    key = key_of(device)
    known: dict[str, Verdict] = {}
    try:
        with _alone(file_of(key), say):
            known = load(device)
            missing = [check for check in LIMITS if again or not set(subjects(check)) <= set(known)]
            if missing:
                say(f"{len(missing)} checks of {key['device']} follow, which take {EXPECTED}")
            for check in missing:
                known |= _check(check, device, say, command)
            if missing:
                _save(key, known, say)
    except Timeout:
        say("another process has been qualifying this device for too long; plain PyTorch runs in this one")
    remember(device, known)
    return known


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process of the machine at a time, where files can be locked.

    Raises:
        Timeout: another one takes longer than it may.
    """
    lock = FileLock(path.with_suffix(".lock"))
    locked = True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is qualifying this device")
        lock.acquire(timeout=sum(LIMITS.values()) + 60)
    except (OSError, RuntimeError):
        locked = False  # _save says why
    try:
        yield
    finally:
        if locked:
            lock.release()


def subjects(check: str | None = None) -> list[str]:
    """What a check has verdicts about, or all of them."""
    checks = LIMITS if check is None else (check,)
    return [f"{check} {dtype_name(dtype)}" for check in checks for dtype in DTYPES]


def _check(check: str, device: torch.device, say: Callable[[str], None], command: Command) -> dict[str, Verdict]:
    """One check's verdicts; a subject without one is unknown, but failed if the process crashed at it."""
    say(f"{check}, at most {LIMITS[check]:.0f} s")
    environment = {QUALIFYING: "1", **dict.fromkeys(SCRUBBED)}
    outcome = process.run(command(check, device), LIMITS[check], PACKAGE.parent, environment)
    found = {
        result["subject"]: Verdict(result["outcome"], result.get("reason", ""), result.get("smallest", 0))
        for result in outcome.results
        if isinstance(result, dict) and {"subject", "outcome"} <= set(result)
    }
    left = [subject for subject in subjects(check) if subject not in found]
    for subject in left:
        crashed = outcome.status == "crashed" and subject == left[0]
        reason = f"its check {outcome.status} {outcome.reason}"
        found[subject] = Verdict(FAILED if crashed else UNKNOWN, reason)
    for subject, verdict in found.items():
        say(f"  {subject}: {verdict.outcome} {verdict.reason}".rstrip())
    return found


def _save(key: dict[str, Any], known: dict[str, Verdict], say: Callable[[str], None]) -> None:
    try:
        path = save(key, known, date=datetime.date.today().isoformat())
        say(f"kept in {path}")
    except (OSError, RuntimeError) as error:
        warnings.warn(f"the verdicts cannot be kept, and hold for this process alone: {error}", stacklevel=3)
