"""Which plan runs: the programs of a model, bounded in number, rebuilt when what they depend on has changed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.capture import capture, values_of
from twins_fast.attacks.engine.executors import executor_for
from twins_fast.attacks.engine.function import Function
from twins_fast.attacks.engine.nodes import NotCaptured, in_one_line
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.schedule import build
from twins_fast.attacks.engine.verify import difference
from twins_fast.attacks.engine.watch import Watch, obstacle
from twins_fast.attacks.engine.widened import widened
from twins_fast.devices import capturing
from twins_fast.models.output import Output
from twins_fast.nn.guards import random_numbers_restored
from twins_fast.ops.native import dtype_name
from twins_fast.verdicts import PASSED, tell_once, verdict

Kind = tuple[tuple[int, ...], torch.dtype, torch.device, Output]  # shape of an image, precision, device, result

KEPT_PLANS = 4
KEPT_MODELS = 16  # of one that is kept alive by itself, such as by a method of its own, nothing else would ever go
RESTLESS = 8  # rebuilds in a row after which a model runs in eager mode
RESTLESSNESS = "the model's attributes change from call to call: keep what counts calls out of the model"


class Known(NamedTuple):
    """A plan, or why there is none, and what about the model that depends on."""

    fingerprint: tuple | None
    program: Program | str
    numbers: dict[str, str]


_caches: OrderedDict[int, tuple[weakref.ref, PlanCache]] = OrderedDict()  # by id() of a module or a function
_caches_lock = threading.Lock()


def plans_of(model: nn.Module) -> PlanCache:
    """The plans of ``model``, which all attacks on it share, and which go when it goes."""
    owner = model.owner if isinstance(model, Function) else model
    key = id(owner)
    with _caches_lock:
        reference, cache = _caches.get(key, (None, None))
        if cache is None or reference() is not owner:
            cache = PlanCache()
            _caches[key] = weakref.ref(owner, lambda _: _caches.pop(key, None)), cache
        _caches.move_to_end(key)
        while len(_caches) > KEPT_MODELS:
            _caches.popitem(last=False)
    return cache


class PlanCache:
    """The plans of a model; ``lock`` is held while one is built or runs, ``watch`` looks at the model in every call."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.watch = Watch()
        self.forget()

    def forget(self) -> None:
        """Drop all plans and their memory."""
        self._obstacles: dict[tuple, str] = {}  # (dtype, device) of images -> what obstacle() said
        self._plans: OrderedDict[Kind, Known] = OrderedDict()
        self._changes: dict[Kind, int] = {}  # rebuilds in a row
        self._told: set[str] = set()  # reasons
        self._untold = ""

    def program(
        self,
        model: nn.Module,
        images: Tensor,
        dtype: torch.dtype,
        chunk_size: int | None = None,
        insist: bool = False,
        rounded: bool = False,
        output: Output = None,
    ) -> Program | str:
        """The program of ``model`` in eval mode for images like these in this precision, or why there is none.

        Args:
            chunk_size: how many images it is to take at once.
            insist: whether a device without a verdict will do, and an error in the engine itself is raised. Without,
                it is a reason that is remembered, for :meth:`tell`.
            rounded: whether it is for batches of many sizes.
            output: which of the model's results the logits are.
        """
        reason = "" if insist else _reservation(images.device, dtype)
        if reason:
            return reason
        kind = (tuple(images.shape[1:]), dtype, images.device, output)
        numbers: dict[str, str] = {}
        try:
            if self.watch.look(model):
                self._obstacles.clear()
            about = (images.dtype, images.device)
            if about not in self._obstacles:
                self._obstacles[about] = obstacle(model, images)
            reason = self._obstacles[about]
            if reason:
                self._note(reason)
                return reason
            program, numbers = self._known(kind, model, images.device)
            if program is None:
                changes = self._changes[kind] = self._changes.get(kind, -1) + 1
                if changes > RESTLESS:
                    self._note(RESTLESSNESS)
                    return RESTLESSNESS
                self._plans.pop(kind, None)  # frees its memory before the new one takes some
                program = self._build(model, images, dtype, output, numbers)
            else:
                self._changes[kind] = 0
            self._keep(kind, program, numbers)
            if isinstance(program, Program):
                program.chunk_size = chunk_size
                wrong = difference(program, model, images, rounded)
                if wrong:
                    raise NotCaptured(wrong)
            return program
        except Exception as error:
            expected = isinstance(error, NotCaptured)
            reason = str(error) if expected else f"planning failed: {in_one_line(error)}"
            if insist and not expected:
                raise RuntimeError(f"engine='plan': {reason}") from error
            self._keep(kind, reason, numbers)
            self._note(reason)
        return reason

    def _note(self, reason: str) -> None:
        if reason not in self._told:
            self._untold = reason

    def tell(self, consequence: str, stacklevel: int) -> None:
        """Warn of the last refusal, once for each reason, however many attacks on the model there are."""
        if self._untold:
            reason, self._untold = self._untold, ""
            self._told.add(reason)
            warnings.warn(f"{reason}; {consequence}", stacklevel=stacklevel + 1)

    def programs(self) -> list[Program]:
        """All that can run."""
        return [known.program for known in self._plans.values() if isinstance(known.program, Program)]

    def refuse(self, program: Program, reason: str) -> None:
        """Have the model attacked in eager mode, for ``reason``, where ``program`` has been."""
        with self.lock:
            self._told.add(reason)  # whoever refuses says why
            for kind, known in self._plans.items():
                if known.program is program:
                    self._plans[kind] = known._replace(program=reason)

    def _known(self, kind: Kind, model: nn.Module, device: torch.device) -> tuple[Program | str | None, dict[str, str]]:
        """What is known for the model as it is, and for which numbers."""
        known = self._plans.get(kind)
        if known is None or known.fingerprint is not self.watch.fingerprint:
            return None, {}
        if known.numbers and not capturing(device) and known.numbers != values_of(model, known.numbers):
            return None, {}
        return known.program, known.numbers

    def _keep(self, kind: Kind, program: Program | str, numbers: dict[str, str]) -> None:
        self._plans[kind] = Known(self.watch.fingerprint, program, numbers)
        self._plans.move_to_end(kind)
        while len(self._plans) > KEPT_PLANS:
            self._changes.pop(self._plans.popitem(last=False)[0], None)

    @staticmethod
    def _build(
        model: nn.Module, images: Tensor, dtype: torch.dtype, output: Output, numbers: dict[str, str]
    ) -> Program:
        shape = tuple(images.shape[1:])
        if images.dtype.itemsize == 2:  # what it keeps from its first call is to be of its own type
            with torch.no_grad(), random_numbers_restored():
                model(images[:1])
        with widened(model):
            nodes = capture(model, shape, images.device, output, numbers)
        program = Program(build(nodes), nodes, model, shape, executor_for(dtype, images.device))
        program.output = output
        return program


def _reservation(device: torch.device, dtype: torch.dtype) -> str:
    """Why the plan does not run on a device unless it is asked for; "" if it does."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"the plan does not run on {device.type}"
    subject = f"plan {dtype_name(dtype)}"
    found = verdict(device, subject)
    if found.outcome == PASSED:
        return ""
    tell_once(device, subject)
    return f"the plan is {found.outcome} on this device: {found.reason}"
