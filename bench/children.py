"""Functions in processes of their own, with limits of time and memory: a crash is a result, and never the end."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import one_line

FORK = multiprocessing.get_context("fork")  # what the parent has imported is there; it must not have used threads
PAUSE = 0.1  # seconds between two looks at the processes


class Ended(Exception):
    """A process gave no result; the message says why."""


@dataclass(frozen=True)
class Limits:
    seconds: float
    gigabytes: float


class Child:
    """``function(*arguments)`` in a process of its own."""

    def __init__(self, limits: Limits, function: Callable, *arguments: Any):
        self.limits = limits
        self.deadline = time.monotonic() + limits.seconds
        self.answers, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_work, args=(sender, limits.gigabytes, function, arguments), daemon=True)
        self.process.start()
        sender.close()

    def ready(self) -> bool:
        """Whether there is a result, or will be none any more."""
        return self.answers.poll() or self.process.exitcode is not None or time.monotonic() > self.deadline

    def result(self) -> Any:
        """What the function returned, once :meth:`ready`.

        Raises:
            Ended: it raised, its process died, or it took too long.
        """
        try:
            if self.answers.poll():
                returned, result = self.answers.recv()
                if not returned:
                    raise Ended(result)
                return result
        except EOFError:
            self.process.join(PAUSE)
        finally:
            code = self.process.exitcode
            self.process.kill()
            self.process.join()
            self.answers.close()
        if code is None:
            raise Ended(f"not ready after {self.limits.seconds:.0f} s")
        raise Ended(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}")


def _work(sender: Any, gigabytes: float, function: Callable, arguments: tuple) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30), -1))
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):  # networks print, and compilers of C++ do
            os.dup2(nowhere.fileno(), stream)
    # A fork leaves PyTorch without its pool of threads; two threads that ask for it first at once end in an abort.
    torch.set_num_threads(torch.get_num_threads())
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:
        sender.send((False, one_line(error)))


def in_children(
    function: Callable, tasks: Iterable[tuple], limits: Limits, workers: int = 1
) -> Iterator[tuple[tuple, Any]]:
    """Each task with ``function(*task)``, or with an :class:`Ended`, as they are ready; so many at a time."""
    waiting, running = iter(tasks), {}
    while True:
        while len(running) < workers and (task := next(waiting, None)) is not None:
            running[task] = Child(limits, function, *task)
        if not running:
            return
        for task in [task for task, child in running.items() if child.ready()]:
            try:
                yield task, running.pop(task).result()
            except Ended as ended:
                yield task, ended
        time.sleep(PAUSE)


def alone(limits: Limits, function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` in a process of its own.

    Raises:
        Ended: it gave no result.
    """
    ((_, result),) = in_children(function, [arguments], limits)
    if isinstance(result, Ended):
        raise result
    return result
