"""A network at the engine's speed, for any attack that calls it and asks for gradients of the images."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twins_fast.attacks.engine.cache import PlanCache, plans_of
from twins_fast.attacks.engine.explain import Explanation, explain
from twins_fast.attacks.engine.memory import out_of_memory
from twins_fast.attacks.engine.nodes import as_float32, in_one_line
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.watch import PLANNED_DTYPES, Wrapper, unwrapped
from twins_fast.devices import autocast, compute_dtype
from twins_fast.nn.modes import modules_of
from twins_fast.validation import check_amp_dtype


def accelerate(model: nn.Module, amp_dtype: torch.dtype | None = None) -> Accelerated:
    """``model`` as a network that is attacked faster, for attack libraries and loops of one's own.

    In eval mode its forward runs the attack engine's plan (docs/attack.md), and the backward pass of its logits that
    plan's backward: to the images and to nothing else, parameters get no gradient. Several forwards may be alive at
    once, each followed by its own backward; ``retain_graph=True`` works, a second derivative does not.

    What the engine does not run is the model itself: train mode, a model that cannot be planned (with one warning, and
    the reason in :meth:`Accelerated.explain`), arguments besides the images, anything but [N, C, H, W] in float32 or
    half precision, as the model is.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes]; it stays as it is, and belongs to the result.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` to compute in half precision; None follows the surrounding
            autocast state, and a model of half precision is computed in that. The plan's logits are float32 unless the
            model is of half precision and ``amp_dtype`` None.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: an unknown ``amp_dtype``.
    """
    return Accelerated(model, amp_dtype)


class Accelerated(Wrapper):
    """What :func:`accelerate` makes of a network: a module with its parameters, buffers, flags and attributes.

    Parameters are folded into the plan once, and again when one has changed, as version counters and addresses say:
    after a step of an optimiser, ``load_state_dict``, a forward in train mode. A write to ``.data`` leaves no trace;
    call :meth:`refresh` after it.

    Attributes:
        module: the model.
    """

    def __init__(self, model: nn.Module, amp_dtype: torch.dtype | None = None):
        if not isinstance(model, nn.Module):
            hint = "; PGD takes functions, too" if callable(model) else ""
            raise TypeError(f"accelerate() takes an nn.Module, got {type(model).__name__}{hint}")
        check_amp_dtype(amp_dtype)
        super().__init__()
        self.module = model.module if isinstance(model, Accelerated) else model
        self.amp_dtype = amp_dtype

    @property
    def training(self) -> bool:
        """The model's own flag, which :meth:`train` and :meth:`eval` set."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing: whoever sets it goes on to the children."""

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor is."""
        return next((t for tensors in (self.parameters(), self.buffers()) for t in tensors), torch.empty(0)).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet: a copy is being made
                raise
            return getattr(self.module, name)

    def extra_repr(self) -> str:
        return f"amp_dtype={self.amp_dtype}"

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits [N, classes] of ``images`` [N, C, H, W] of any range."""
        if args or not self._are_defaults(kwargs) or not self._is_plannable(images):
            return self.module(images, *args, **kwargs)
        model = unwrapped(self.module)
        cache = plans_of(model)
        with cache.lock:
            program, failure = self._program(cache, model, images), ""
            if isinstance(program, Program):
                try:
                    return self._planned(program, cache, model, images)
                except Exception as error:
                    failure = f"the plan failed: {in_one_line(error)}"
                    program.free()
                    if not out_of_memory(error):
                        cache.refuse(program, failure)
        logits = self.itself(images)
        if failure:
            warnings.warn(f"{failure}; the model runs as it is", stacklevel=4)
        cache.tell("the model runs as it is", stacklevel=4)
        return logits

    def itself(self, images: Tensor) -> Tensor:
        """The logits by the model, in the precision that was asked for."""
        with autocast(self.amp_dtype, images.device):
            logits = self.module(images)
        return logits if self.amp_dtype is None else logits.float()

    def explain(self, images: Tensor) -> Explanation:
        """How a forward on images like these [N, C, H, W] runs, layer by layer, and why; ``str()`` is a table."""
        model = unwrapped(self.module)
        program: Program | str = "these are no images [N, C, H, W] in float32 or half precision"
        if any(module.training for module in modules_of(self.module)):
            program = "the model is in train mode: call .eval()"
        if self._is_plannable(images):
            with plans_of(model).lock:
                program = self._program(plans_of(model), model, images)
        return explain(program, model, images, False, (), rounded=True)

    def refresh(self) -> None:
        """Have the parameters folded anew: to be called after a write to their ``.data``."""
        for program in plans_of(unwrapped(self.module)).programs():
            program.folded = None

    def _are_defaults(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call without these arguments is the same."""
        if not kwargs:
            return True
        known = inspect.signature(self.module.forward).parameters
        return all(name in known and value is known[name].default for name, value in kwargs.items())

    def _is_plannable(self, images: Any) -> bool:
        return (
            type(images) in (Tensor, nn.Parameter)
            and images.dim() == 4
            and images.dtype in PLANNED_DTYPES
            and not torch.compiler.is_compiling()
            and not torch._C._functorch.is_functorch_wrapped_tensor(images)
            and not any(module.training for module in modules_of(self.module))
        )

    def _program(self, cache: PlanCache, model: nn.Module, images: Tensor) -> Program | str:
        return cache.program(model, images, compute_dtype(self.amp_dtype, images), rounded=True)

    def _planned(self, program: Program, cache: PlanCache, model: nn.Module, images: Tensor) -> Tensor:
        state = cache.watch.state()
        differentiable = torch.is_grad_enabled() and images.requires_grad
        # What the program allocates in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if state is None or program.folded != state:
                with program.in_turn():
                    program.fold(model)
                program.folded = state
            if not differentiable:
                logits = program.forward(as_float32(images), cache.watch.changes, differentiable=False)[0]
        if differentiable:
            logits = _Logits.apply(images, self, program, cache)
        return logits.to(images.dtype) if self.amp_dtype is None else logits


class _Logits(torch.autograd.Function):
    """A program's logits, and the gradient of its images from theirs."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, owner: Accelerated, program: Program, cache: PlanCache) -> Tensor:
        ctx.owner, ctx.program, ctx.lock = owner, program, cache.lock
        ctx.about, ctx.folded = cache.watch.changes, program.folded
        with torch.autocast(images.device.type, enabled=False):
            logits, kept = program.forward(as_float32(images), ctx.about, differentiable=True)
        ctx.save_for_backward(images, *(part.saved for part in kept))  # PyTorch frees them after the backward pass
        ctx.kept = [replace(part, saved=None) for part in kept]
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        images, *saved = ctx.saved_tensors
        kept = [replace(part, saved=data) for part, data in zip(ctx.kept, saved, strict=True)]
        program: Program = ctx.program
        with ctx.lock:
            if program.folded != ctx.folded:
                raise RuntimeError("the model's parameters have changed between the forward and the backward pass")
            try:
                with torch.autocast(images.device.type, enabled=False):
                    found = program.backward(as_float32(images), gradient, kept, ctx.about)
                    return found.to(images.dtype), None, None, None
            except Exception as error:
                failure = f"the plan failed: {in_one_line(error)}; the gradient is that of the model as it is"
                program.free()
        warnings.warn(failure, stacklevel=2)
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            return torch.autograd.grad(ctx.owner.itself(images).float(), images, gradient)[0], None, None, None
