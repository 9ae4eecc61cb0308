"""Which plan runs: the programs of a model, bounded in number, rebuilt when what they depend on has changed."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.capture import capture
from twins_fast.attacks.engine.executors import executor_for
from twins_fast.attacks.engine.nodes import NotCaptured
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

    def program(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program | str:
        """The program of ``model`` in eval mode for images like these in this precision, or why there is none."""
        reason = obstacle(model, images)
        if reason:
            return reason
        if model is not self._model():
            self.forget()
            self._model = weakref.ref(model)
        kind = (tuple(images.shape[1:]), dtype, images.device)
        key = (*kind, fingerprint(model))
        program = self._plans.get(key)
        if program is None:
            changes = self._changes[kind] = self._changes.get(kind, -1) + 1
            if changes > RESTLESS:
                return "the model's attributes change from call to call"
            for old in [old for old in self._plans if old[:3] == kind]:  # the model has changed since
                del self._plans[old]
            program = self._build(model, images, dtype)
            self._plans[key] = program
            while len(self._plans) > KEPT_PLANS:
                self._changes.pop(self._plans.popitem(last=False)[0][:3], None)
        else:
            self._changes[kind] = 0
            self._plans.move_to_end(key)
        if isinstance(program, Program) and not agrees(program, model, images):
            program = self._plans[key] = "the plan's logits or gradients are not the model's"
        return program

    def _build(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program | str:
        try:
            nodes = capture(model, tuple(images.shape[1:]), images.device)
            plan = build(nodes)
            return Program(plan, nodes, model, tuple(images.shape[1:]), executor_for(dtype, images.device))
        except NotCaptured as reason:
            return str(reason)
        except Exception as error:  # a model that runs in eager mode must not fail because of a plan
            return f"planning failed: {type(error).__name__}: {error}"
