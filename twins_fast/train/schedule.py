"""Learning rates."""

from __future__ import annotations

from twins_fast.train.recipe import Optimizer


def learning_rate(optimizer: Optimizer, step: int, steps_per_epoch: int, halvings: int = 0) -> float:
    """The rate of a step, counted from 0: a pure function, so that a resumed run needs no state but ``halvings``.

    ``multistep`` multiplies by ``gamma`` at each milestone; ``onecycle`` rises linearly to ``lr`` over the first
    ``warmup`` of the run and falls linearly to zero; ``auto`` has been halved so many times.
    """
    if optimizer.schedule == "auto":
        return optimizer.lr / 2**halvings
    if optimizer.schedule == "multistep":
        return optimizer.lr * optimizer.gamma ** sum(step >= m * steps_per_epoch for m in optimizer.milestones)
    progress = (step + 0.5) / (optimizer.epochs * steps_per_epoch)
    return optimizer.lr * min(progress / optimizer.warmup, (1 - progress) / (1 - optimizer.warmup))
