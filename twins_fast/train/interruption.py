"""Ctrl-C and SIGTERM, which wait for the end of a training step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered, both signals raise :class:`KeyboardInterrupt`: at once, or at the end of :meth:`held`.

    A second signal while the first one is held raises at once. Does nothing outside the main thread, where Python
    handles no signals.

    Args:
        agreed: where several processes have to stop together: whether one of them has a signal. Then all signals wait
            for the end of :meth:`held`: torchrun passes on what a terminal or Slurm has already sent to everybody.
    """

    def __init__(self, agreed: Callable[[bool], bool] | None = None):
        self._agreed = agreed
        self._holding = self._noted = False
        self._before = {}
        self.broke_in = False  # what was held did not end; its state is half one thing and half the other

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What stands inside is finished before a signal raises."""
        self._holding = self.broke_in = True
        try:
            yield
            self.broke_in = False
        finally:
            self._holding = False
        if self._agreed(self._noted) if self._agreed else self._noted:
            raise KeyboardInterrupt

    def _note(self, number, frame) -> None:
        if not self._agreed and (self._noted or not self._holding):
            raise KeyboardInterrupt
        self._noted = True
