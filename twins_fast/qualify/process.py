"""A command with a limit, which reports results line by line: a crash or the limit loses only what follows."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PREFIX = "RESULT "  # of a line that reports a result, as JSON
KEPT_LINES = 60  # of the output
GRACE = 5.0  # seconds between being asked to end and being killed


@dataclass
class Outcome:
    """What became of a command.

    Attributes:
        status: ``passed``, ``failed``, ``crashed``, ``stopped`` at its limit, ``missing`` or ``skipped``.
        results: all that it reported, also if it did not end well.
        output: its last lines.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    results: list[Any] = field(default_factory=list)
    output: list[str] = field(default_factory=list)


def report(**values: Any) -> None:
    """Report a result, from inside a command."""
    print(PREFIX + json.dumps(values), flush=True)


def run(
    command: Sequence[str],
    limit: float,
    folder: Path,
    environment: Mapping[str, str | None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run a command in a session of its own, which ends with it.

    Args:
        limit: seconds that it may take.
        environment: what it has besides this process's own, and with None what it has not.
        say: is given each line that is no result.
    """
    started = time.monotonic()
    wanted = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
    merged = {name: value for name, value in wanted.items() if value is not None}
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=merged,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome("missing", f"{command[0]}: {error.strerror}")
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    results: list[Any] = []
    output: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        stopped = not _collect(lines, started + limit, results, output, say)
    except BaseException:  # Ctrl-C, for one
        _end(process)
        raise
    if stopped:
        _end(process)
        _collect(lines, time.monotonic() + 1, results, output, say)
    code = process.wait()
    status, reason = "passed", ""
    if stopped:
        status, reason = "stopped", f"at its limit of {limit:.0f} s"
    elif code < 0:
        status, reason = "crashed", f"by {signal.Signals(-code).name}"
    elif code:
        status, reason = "failed", f"exit code {code}: {output[-1] if output else 'no output'}"
    return Outcome(status, reason, round(time.monotonic() - started, 1), results, list(output))


def _read(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    with pipe:
        for line in pipe:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _collect(
    lines: queue.Queue[str | None], until: float, results: list[Any], output: deque[str], say: Callable[[str], None]
) -> bool:
    """Sort lines into results and output; whether the process has ended before the time ``until``."""
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return False
        if line is None:
            return True
        if line.startswith(PREFIX):
            with contextlib.suppress(ValueError):  # a line that a crash cut
                results.append(json.loads(line.removeprefix(PREFIX)))
                continue
        output.append(line)
        say(line)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and all that it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
