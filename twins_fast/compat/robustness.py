"""The robustness library's networks that attack themselves (https://github.com/MadryLab/robustness), and faster.

``model = twins_fast.compat.robustness.accelerate(model)`` after ``make_and_restore_model``; then as before::

    output, adversarial = model(images, labels, make_adv=True, constraint="inf", eps=8 / 255, step_size=2 / 255,
                                iterations=10)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.attacks.balls import lengths
from twins_fast.attacks.pgd import ENGINES
from twins_fast.compat.balls import BallPGD, OffsetBall
from twins_fast.nn.modes import in_mode
from twins_fast.validation import check_amp_dtype, check_choice

_NORMS = {"inf": "linf", "2": "l2"}


def accelerate(model: nn.Module, amp_dtype: torch.dtype | None = None, engine: str = "auto") -> nn.Module:
    """Let an ``AttackerModel`` attack by :class:`twins_fast.PGD` wherever that knows how.

    So it does for ``constraint="inf"`` and ``"2"``; another constraint, ``custom_loss``, ``est_grad`` and ``do_tqdm``
    run as before. ``mixed_precision=True`` is float16 on a GPU and bfloat16 on a CPU. Names of the state dict stay. Of
    several random restarts an image keeps one that fooled the network; the library keeps the last one.

    Args:
        model: changed in place and returned.
        amp_dtype, engine: of :class:`twins_fast.PGD`.

    Raises:
        TypeError: a model without the library's ``attacker``.
    """
    check_amp_dtype(amp_dtype)
    check_choice("engine", engine, ENGINES)
    attacker: Any = getattr(model, "attacker", None)
    if not all(isinstance(getattr(attacker, name, None), nn.Module) for name in ("model", "normalize")):
        raise TypeError(f"{type(model).__name__} is no AttackerModel: it lacks attacker.model and attacker.normalize")
    kind: Any = type(attacker)
    attacker.__class__ = _fast(kind)
    attacker.engine, attacker.amp_dtype = engine, amp_dtype
    return model


@functools.cache
def _fast(kind: Any) -> Any:
    return kind if issubclass(kind, _FastAttacker) else type(f"Fast{kind.__name__}", (_FastAttacker, kind), {})


class _FastAttacker(nn.Module):
    """In front of the library's ``Attacker``."""

    engine: str
    amp_dtype: torch.dtype | None
    model: nn.Module
    normalize: nn.Module

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        *_: Any,
        constraint: Any,
        eps: float,
        step_size: float,
        iterations: int,
        random_start: bool = False,
        random_restarts: int = False,
        do_tqdm: bool = False,
        targeted: bool = False,
        custom_loss: Any = None,
        should_normalize: bool = True,
        orig_input: Tensor | None = None,
        use_best: bool = True,
        return_image: bool = True,
        est_grad: Any = None,
        mixed_precision: bool = False,
    ) -> Tensor:
        if constraint not in _NORMS or custom_loss or est_grad or do_tqdm:
            given = locals()
            return super().forward(x, target, **{name: given[name] for name in _PASSED})
        dtype = self.amp_dtype
        if mixed_precision and dtype is None:
            dtype = torch.float16 if x.is_cuda else torch.bfloat16
        network = self._normalised() if should_normalize else self.model
        attack = BallPGD(
            OffsetBall,
            network,
            eps,
            step_size,
            iterations,
            norm=_NORMS[constraint],
            random_start=False,
            best=use_best,
            targeted=targeted,
            engine=self.engine,
            amp_dtype=dtype,
            more={"division": 1e-10},
        )
        centre = x.detach() if orig_input is None else orig_input.to(x.device)
        found: Tensor | None = None
        for _number in range(random_restarts or 1):
            start = self._start(x.detach(), constraint, eps) if random_start else x.detach()
            adversarial = attack(centre, target, x_init=start)
            if found is None:
                found = adversarial
                continue
            with in_mode(network, training=False), torch.no_grad():
                reached = (network(adversarial).argmax(1) == target) == targeted
            found = torch.where(reached.view(-1, 1, 1, 1), adversarial, found)
        assert found is not None
        return found

    def _normalised(self) -> nn.Module:
        if "__normalised__" not in vars(self):
            vars(self)["__normalised__"] = nn.Sequential(self.normalize, self.model)
        return vars(self)["__normalised__"]

    def _start(self, x: Tensor, constraint: str, eps: float) -> Tensor:
        if constraint == "inf":
            noise = 2 * (torch.rand_like(x) - 0.5) * eps
        else:
            noise = torch.randn_like(x)
            noise = eps * noise / (lengths(noise) + 1e-10)
        return (x + noise).clamp(0, 1)


_PASSED = (
    *("constraint", "eps", "step_size", "iterations", "random_start", "random_restarts", "do_tqdm", "targeted"),
    *("custom_loss", "should_normalize", "orig_input", "use_best", "return_image", "est_grad", "mixed_precision"),
)
