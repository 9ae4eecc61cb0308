"""Checks of values that do not wait for a GPU: what is wrong is raised once the values have arrived."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twins_fast.devices import capturing

_sent: deque[tuple[Any, Tensor, Callable[..., None]]] = deque()  # event of the arrival, values, what looks at them
_lock = threading.Lock()


def check_values(values: Tensor, look: Callable[..., None]) -> None:
    """Call ``look(*values)``, which raises if they are bad: at once, or for a GPU in a later :func:`raise_found`.

    Nothing is looked at while a CUDA graph is captured: a replay would not do it again.
    """
    values = values.detach().reshape(-1)
    if capturing(values.device):
        return
    if not _is_on_gpu(values):
        look(*values.tolist())
    else:
        raise_found()
        event, arriving = _send(values)
        with _lock:
            _sent.append((event, arriving, look))


def raise_found() -> None:
    """Raise the first of what checks on a GPU have found by now, and forget the others; waits for nothing."""
    arrived = []
    with _lock:
        while _sent and _sent[0][0].query():
            arrived.append(_sent.popleft())
    for _, values, look in arrived:
        look(*values.tolist())


def _is_on_gpu(values: Tensor) -> bool:
    return values.is_cuda


def _send(values: Tensor) -> tuple[torch.cuda.Event, Tensor]:
    arriving = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    with torch.cuda.device(values.device):
        arriving.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return event, arriving
