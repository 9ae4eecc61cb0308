"""Which plan runs: the programs of a model, bounded, and made anew when what they depend on has changed."""

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
RESTLESS = 8  # changes in a row after which a model is left to eager


class PlanCache:
    """The plans of a model; ``lock`` is held while one is made or runs."""

    def __init__(self):
        self.lock = threading.RLock()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self.forget()

    def forget(self) -> None:
        """Drop all plans and their memory."""
        self._plans: OrderedDict[tuple, Program | str] = OrderedDict()
        self._changes: dict[tuple, int] = {}  # images' kind -> captures in a row of one that had been captured before

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
        found = self._plans.get(key)
        if found is None:
            changes = self._changes[kind] = self._changes.get(kind, -1) + 1
            if changes > RESTLESS:
                return "the model's attributes change from call to call"
            for old in [old for old in self._plans if old[:3] == kind]:  # the model is no longer what it was
                del self._plans[old]
            found = self._make(model, images, dtype)
            self._plans[key] = found
            while len(self._plans) > KEPT_PLANS:
                self._changes.pop(self._plans.popitem(last=False)[0][:3], None)
        else:
            self._changes[kind] = 0
            self._plans.move_to_end(key)
        if isinstance(found, Program) and not agrees(found, model, images):
            found = self._plans[key] = "the plan's logits or gradients are not the model's"
        return found

    def _make(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Program | str:
        try:
            nodes = capture(model, tuple(images.shape[1:]), images.device)
            plan = build(nodes)
            return Program(plan, nodes, model, tuple(images.shape[1:]), executor_for(dtype, images.device))
        except NotCaptured as reason:
            return str(reason)
        except Exception as error:  # what runs in eager must not fail for the sake of a plan
            return f"planning failed: {type(error).__name__}: {error}"
