"""The networks that an attack's loop runs: the model itself, its plan pass by pass, and either behind a normalisation.

The plan's own, for a chunk of images, is :class:`twins_fast.attacks.engine.passes.Pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from twins_fast.attacks.ascent import Network
from twins_fast.attacks.engine.nodes import NotCaptured
from twins_fast.attacks.engine.passes import Kept
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.verify import difference


class Eager:
    """``run`` (images -> logits) under autograd.

    Args:
        first: around the first pass.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], first: AbstractContextManager[object]):
        self._run = run
        self._around = first
        self._ends: tuple[Tensor, Tensor] | None = None

    def logits(self, x: Tensor) -> Tensor:
        self._ends = None  # whose memory the next pass may need
        with torch.enable_grad(), self._around:
            x = x.detach().requires_grad_()
            self._ends = x, self._run(x)
        self._around = nullcontext()
        return self._ends[1].detach()

    def gradient(self, x: Tensor, logits_gradient: Tensor) -> Tensor:
        assert self._ends is not None
        leaf, logits = self._ends
        with torch.enable_grad():  # given the gradient itself, PyTorch would import sympy, which takes half a second
            return torch.autograd.grad((logits * logits_gradient).sum(), leaf)[0]


class Passes:
    """A program whose passes run one by one, with any number of images.

    What happens between them may read values, which it may not in a CUDA graph of all passes.
    """

    def __init__(self, program: Program, model: nn.Module, about: Hashable):
        self._program = program
        self._model = model
        self._about = about
        self._kept: list[Kept] = []

    def logits(self, x: Tensor) -> Tensor:
        wrong = difference(self._program, self._model, x, rounded=True)
        if wrong:
            raise NotCaptured(wrong)
        logits, self._kept = self._program.forward(x, self._about, differentiable=True)
        return logits

    def gradient(self, x: Tensor, logits_gradient: Tensor) -> Tensor:
        return self._program.backward(x, logits_gradient, self._kept, self._about)


class Normalised:
    """A network of normalised images as one of pixels; ``mean`` and ``std`` are [1, C, 1, 1]."""

    def __init__(self, network: Network, mean: Tensor, std: Tensor):
        self._network = network
        self._mean, self._std = mean, std

    def logits(self, x: Tensor) -> Tensor:
        self._seen = (x - self._mean) / self._std
        return self._network.logits(self._seen)

    def gradient(self, x: Tensor, logits_gradient: Tensor) -> Tensor:
        return self._network.gradient(self._seen, logits_gradient) / self._std
