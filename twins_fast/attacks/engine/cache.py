"""Which plan runs: the programs of a model, bounded in number, rebuilt when what they depend on has changed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.capture import capture
from twins_fast.attacks.engine.executors import executor_for
from twins_fast.attacks.engine.nodes import NotCaptured, in_one_line
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.schedule import build
from twins_fast.attacks.engine.verify import agrees
from twins_fast.attacks.engine.watch import fingerprint, obstacle

KEPT_PLANS = 4
RESTLESS = 8  # rebuilds in a row after which a model runs in eager mode


class PlanCache:
    """The plans of a model; ``lock`` is held while one is built or runs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self.forget()

    def forget(self) -> None:
        """Drop all plans and their memory."""
        self._plans: OrderedDict[tuple, Program | str] = OrderedDict()
        self._changes: dict[tuple, int] = {}  # (shape, dtype, device) of images -> rebuilds in a row

    def program(self, model: nn.Module, images: Tensor, dtype: torch.dtype, insist: bool = False) -> Program | str:
        """The program of ``model`` in eval mode for images like these in this precision, or why there is none.

        Args:
            insist: whether an error in the engine itself is raised. Without, it is a reason that is remembered, and
                a warning.
        """
        if model is not self._model():
            self.forget()
            self._model = weakref.ref(model)
        kind = (tuple(images.shape[1:]), dtype, images.device)
        key = (*kind, None)  # of a model that has no fingerprint
        try:
            reason = obstacle(model, images)
            if reason:
                return reason
            fingerprinted = (*kind, fingerprint(model))
            program = self._plans.get(fingerprinted)
            key = fingerprinted
            if program is None:
                changes = self._changes[kind] = self._changes.get(kind, -1) + 1
                if changes > RESTLESS:
                    return "the model's attributes change from call to call"
                for old in [old for old in self._plans if old[:3] == kind]:  # the model has changed since
                    del self._plans[old]
                program = self._build(model, images, dtype)
            else:
                self._changes[kind] = 0
            self._keep(key, program)
            if isinstance(program, Program) and not agrees(program, model, images):
                raise NotCaptured("the plan's logits or gradients are not the model's")
            return program
        except Exception as error:
            expected = isinstance(error, NotCaptured)
            reason = str(error) if expected else f"planning failed: {in_one_line(error)}"
            if insist and not expected:
                raise RuntimeError(f"engine='plan': {reason}") from error
            known = expected or self._plans.get(key) == reason
            self._keep(key, reason)
        if not known:
            warnings.warn(f"{reason}; the model is attacked in eager mode", stacklevel=5)
        return reason

    def refuse(self, program: Program, reason: str) -> None:
        """Have the model attacked in eager mode, for ``reason``, where ``program`` has been."""
        with self.lock:
            self._plans.update({key: reason for key, known in self._plans.items() if known is program})

    def _keep(self, key: tuple, program: Program | str) -> None:
        self._plans[key] = program
        self._plans.move_to_end(key)
        while len(self._plans) > KEPT_PLANS:
            self._changes.pop(self._plans.popitem(last=False)[0][:3], None)

    @staticmethod
    def _build(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program:
        shape = tuple(images.shape[1:])
        nodes = capture(model, shape, images.device)
        return Program(build(nodes), nodes, model, shape, executor_for(dtype, images.device))
