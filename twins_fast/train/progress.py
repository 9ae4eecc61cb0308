"""How far a run is: a bar in a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time

from tqdm import tqdm

LINE_EVERY_SECONDS = 30.0


class Progress:
    """Of ``total`` steps, or what else is counted, ``done`` of which earlier processes made; silent if not shown."""

    def __init__(self, total: int, done: int, unit: str = "step", shown: bool = True):
        # None: in terminals only
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=None if shown else True)
        self._shown = shown
        self._unit, self._total, self._first, self._done = unit, total, done, done
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def step(self, images_per_second: float, metrics: dict[str, float]) -> None:
        """Count a step and show its speed, loss and accuracies."""
        shown = {"loss": f"{metrics['loss']:.3f}", "images/s": f"{images_per_second:.0f}"}
        shown |= {k.removesuffix("_accuracy"): f"{v:.0%}" for k, v in metrics.items() if k.endswith("_accuracy")}
        self.advance(1, shown)

    def advance(self, amount: float, shown: dict[str, str], known: bool = False) -> None:
        """Count something, or a part of it; ``known`` if an earlier process made it."""
        self._done += amount
        self._first += amount if known else 0
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(int(self._done + 1e-6) - self._bar.n)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._said >= LINE_EVERY_SECONDS and self._done > self._first:
            self._said = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self._unit} {self._done:.0f}/{self._total}: {words}, {_duration(left)} left", flush=True)

    def write(self, text: str) -> None:
        """A line above the bar."""
        if not self._shown:
            return
        self._bar.write(text) if not self._bar.disable else print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
