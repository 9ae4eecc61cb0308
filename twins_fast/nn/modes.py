"""Train and eval flags, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """``model.train(training)`` inside the block; every module's own flag is put back, also after an error."""
    before = model.training
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        if before != training:
            model.train(before)  # it may do more than set flags, such as taking merged weights apart
        for module, mode in modes:
            module.training = mode
