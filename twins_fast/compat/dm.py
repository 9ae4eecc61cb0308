"""Attacks of DM-Improves-AT and adversarial_robustness_pytorch: change the import.

``from twins_fast.compat.dm import create_attack`` in place of ``from core.attacks import create_attack``
(https://github.com/wzekai99/DM-Improves-AT, https://github.com/imrahulr/adversarial_robustness_pytorch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twins_fast.attacks import PGD
from twins_fast.attacks.balls import Ball
from twins_fast.compat import advertorch
from twins_fast.compat.advertorch import Predict, is_cross_entropy
from twins_fast.compat.balls import PixelBall

ATTACKS = ("fgsm", "linf-pgd", "fgm", "l2-pgd", "linf-df", "l2-df", "linf-apgd", "l2-apgd")
Loss = Callable[..., Tensor] | None


class PGDAttack(advertorch.PGDAttack):
    """advertorch's, which also returns the perturbation, and starts as in TRADES with ``rand_init_type="normal"``."""

    def __init__(
        self,
        predict: Predict,
        loss_fn: Loss = None,
        eps: float | Tensor = 0.3,
        nb_iter: int = 40,
        eps_iter: float | Tensor = 0.01,
        rand_init: bool = True,
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        ord: float = torch.inf,
        targeted: bool = False,
        rand_init_type: str = "uniform",
        **options: Any,
    ):
        numbers = (eps, nb_iter, eps_iter, rand_init, clip_min, clip_max, ord)
        super().__init__(predict, loss_fn, *numbers, targeted=targeted, **options)
        if rand_init_type not in ("uniform", "normal"):
            raise NotImplementedError(f"rand_init_type={rand_init_type!r}: only uniform and normal")
        self.rand_init_type = rand_init_type

    def perturb(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Adversarial images like ``x``, and their difference from ``x``."""
        adversarial = super().perturb(x, y)
        return adversarial, adversarial - x

    def _start(self, x: Tensor) -> Tensor:
        return super()._start(x) if self.rand_init_type == "uniform" else x + 0.001 * torch.randn_like(x)


class _OfOneNorm(PGDAttack):
    """The constructor of both."""

    norm: float

    def __init__(
        self,
        predict: Predict,
        loss_fn: Loss = None,
        eps: float | Tensor = 0.3,
        nb_iter: int = 40,
        eps_iter: float | Tensor = 0.01,
        rand_init: bool = True,
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        targeted: bool = False,
        rand_init_type: str = "uniform",
        **options: Any,
    ):
        numbers = (eps, nb_iter, eps_iter, rand_init, clip_min, clip_max, self.norm)
        super().__init__(predict, loss_fn, *numbers, targeted, rand_init_type, **options)


class LinfPGDAttack(_OfOneNorm):
    """:class:`PGDAttack` in the L-infinity ball."""

    norm = torch.inf


class L2PGDAttack(_OfOneNorm):
    """:class:`PGDAttack` in the L2 ball."""

    norm = 2


class FGSMAttack(PGDAttack):
    """One step of length eps along the sign of the gradient."""

    norm: float = torch.inf

    def __init__(
        self,
        predict: Predict,
        loss_fn: Loss = None,
        eps: float = 0.3,
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        targeted: bool = False,
        **options: Any,
    ):
        super().__init__(predict, loss_fn, eps, 1, eps, False, clip_min, clip_max, self.norm, targeted, **options)

    @property
    def _ball(self) -> type[Ball]:
        return PixelBall


class FGMAttack(FGSMAttack):
    """One step of length eps along the gradient."""

    norm = 2


LinfFastGradientAttack, L2FastGradientAttack = FGSMAttack, FGMAttack


class _APGDAttack:
    """APGD as AutoAttack runs it: images that are not fooled come back clean."""

    norm: str

    def __init__(
        self, predict: Predict, loss_fn: str = "ce", n_restarts: int = 2, eps: float = 0.3, nb_iter: int = 40,
        seed: int = 1, **options: Any,
    ):  # fmt: skip
        options = {"norm": self.norm, "steps": nb_iter, "restarts": n_restarts, **options}
        self.attack = PGD(predict, eps, loss=loss_fn, step_rule="apgd", early_stop=True, **options)
        self.seed = seed

    def perturb(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial images like ``x``, and their difference from ``x``."""
        self.attack.generator = torch.Generator(x.device).manual_seed(self.seed)
        found = self.attack(x, y)
        with torch.no_grad():
            fooled = self.attack.model(found).argmax(1) != y
        adversarial = torch.where(fooled.view(-1, 1, 1, 1), found, x)
        return adversarial, adversarial - x


class LinfAPGDAttack(_APGDAttack):
    """In the L-infinity ball."""

    norm = "linf"


class L2APGDAttack(_APGDAttack):
    """In the L2 ball."""

    norm = "l2"


def create_attack(
    model: Predict,
    criterion: Any,
    attack_type: str,
    attack_eps: float,
    attack_iter: int,
    attack_step: float,
    rand_init_type: str = "uniform",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    **options: Any,
) -> Any:
    """An attack by its name; ``attack.perturb(x, y)`` gives adversarial images and the perturbation.

    Args:
        model: maps images [N, C, H, W] to logits.
        criterion: a loss as in :class:`twins_fast.compat.advertorch.PGDAttack`; for APGD ``"ce"``, ``"dlr"``, or None
            and ``CrossEntropyLoss`` for the former.
        attack_type: one of :data:`ATTACKS`.
        attack_eps, attack_iter, attack_step: radius, steps, and the length of a step.
        rand_init_type: ``"uniform"`` or ``"normal"``.
        clip_min, clip_max: range of the pixel values.
        options: ``engine`` and ``amp_dtype`` of :class:`twins_fast.PGD`.

    Raises:
        NotImplementedError: DeepFool, an unknown name, or of APGD another loss or range of the pixel values.
    """
    box = {"clip_min": clip_min, "clip_max": clip_max, **options}
    if attack_type in ("fgsm", "fgm"):
        return (FGSMAttack if attack_type == "fgsm" else FGMAttack)(model, criterion, attack_eps, **box)
    if attack_type in ("linf-pgd", "l2-pgd"):
        kind = LinfPGDAttack if attack_type == "linf-pgd" else L2PGDAttack
        box["rand_init_type"] = rand_init_type
        return kind(model, criterion, attack_eps, attack_iter, attack_step, **box)
    if attack_type in ("linf-apgd", "l2-apgd"):
        if (clip_min, clip_max) != (0, 1):
            raise NotImplementedError(f"clip_min={clip_min}, clip_max={clip_max}: APGD knows images in [0, 1] only")
        loss = "ce" if criterion is None or is_cross_entropy(criterion) else criterion
        if loss not in ("ce", "dlr"):
            raise NotImplementedError(
                f"criterion={criterion!r}: APGD knows 'ce' and 'dlr'; take twins_fast.PGD(loss=...)"
            )
        apgd = LinfAPGDAttack if attack_type == "linf-apgd" else L2APGDAttack
        return apgd(model, loss, 2, attack_eps, attack_iter, **options)
    if attack_type in ATTACKS:
        raise NotImplementedError(f"attack_type={attack_type!r}: run its own DeepFool on twins_fast.accelerate(model)")
    raise NotImplementedError(f"attack_type={attack_type!r} is none of {', '.join(ATTACKS)}")
