"""Attacks of torchattacks 3.5.1 (https://github.com/Harry24k/adversarial-attacks-pytorch): change the import.

``from twins_fast.compat.torchattacks import PGD`` in place of ``from torchattacks import PGD``. Where torchattacks is
installed, they are subclasses of its ``Attack``, and have all methods of that. With the same seed, on a CPU, in float32
and with ``engine="eager"`` the images are the very same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import accelerate
from twins_fast.compat.balls import BallPGD, OffsetBall, PixelBall
from twins_fast.compat.normalised import normalised
from twins_fast.compat.torchattacks_apgd import Search
from twins_fast.nn.modes import in_mode
from twins_fast.validation import check_choice

try:
    from torchattacks.attack import Attack  # type: ignore[import-untyped]
except ImportError:
    from twins_fast.compat.torchattacks_base import Attack

__all__ = ["APGD", "FFGSM", "FGSM", "MIFGSM", "PGD", "PGDL2", "TPGD"]


class _Planned(Attack):  # type: ignore[misc]
    """What they share: networks in eval mode (or, all of it, in train mode), images [N, C, H, W] in [0, 1].

    Args:
        model: maps normalised images, or images in [0, 1], to logits.
        engine, amp_dtype: of :class:`twins_fast.PGD`, which every attack here takes besides its own arguments (how).
    """

    def __init__(self, name: str, model: nn.Module, *, engine: str = "auto", amp_dtype: torch.dtype | None = None):
        super().__init__(name, model)
        self.engine, self.amp_dtype = engine, amp_dtype
        self.supported_mode = ["default", "targeted"]

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """All of the network in train mode, or none of it.

        Raises:
            NotImplementedError: a part of it.
        """
        if len({model_training, batchnorm_training, dropout_training}) > 1:
            raise NotImplementedError(
                "model_training, batchnorm_training and dropout_training: all of them or none; set the flags of the "
                "modules yourself and attack with torchattacks itself, or call twins_fast.PGD(bn_mode='train')"
            )
        super().set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def _change_model_mode(self, given_training: bool) -> None:
        """The attack sets every module's flag, and puts it back."""

    def _recover_model_mode(self, given_training: bool) -> None:
        """See above."""

    def _network(self) -> nn.Module:
        """Of images in [0, 1]."""
        if self._normalization_applied is not False:
            return self.model
        mean, std = (self.normalization_used[name].flatten().tolist() for name in ("mean", "std"))
        return normalised(self.model, mean, std, torch.device(self.device))

    def _attacked(self, images: Tensor, labels: Tensor, start: Tensor | None, **options: Any) -> Tensor:
        """By PGD from ``start``, the image itself where that is None."""
        kind, more = options.pop("kind", OffsetBall), options.pop("more", {})
        attack = BallPGD(
            kind,
            self._network(),
            more=more,
            random_start=False,
            targeted=self.targeted,
            engine=self.engine,
            amp_dtype=self.amp_dtype,
            bn_mode="train" if self._model_training else "eval",
            **options,
        )
        target = self.get_target_label(images, labels) if self.targeted else labels
        return attack(images, target, x_init=start)

    def _own(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        images = images.detach().to(self.device)
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return images, labels.detach().to(self.device)


def _noisy(images: Tensor, noise: Tensor) -> Tensor:
    return (images + noise).clamp(0, 1)


class FGSM(_Planned):
    """One step of length eps along the sign of the gradient (arXiv 1412.6572)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, **how: Any):
        super().__init__("FGSM", model, **how)
        self.eps = eps

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        return self._attacked(images, labels, None, eps=self.eps, alpha=self.eps, steps=1, kind=PixelBall)


class FFGSM(_Planned):
    """One step of length alpha from a random start (arXiv 2001.03994)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 10 / 255,
        **how: Any,
    ):
        super().__init__("FFGSM", model, **how)
        self.eps, self.alpha = eps, alpha

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        noise = torch.randn_like(images).uniform_(-self.eps, self.eps)  # drawn twice there, too
        return self._attacked(images, labels, _noisy(images, noise), eps=self.eps, alpha=self.alpha, steps=1)


class PGD(_Planned):
    """Projected gradient descent in the L-infinity ball (arXiv 1706.06083)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        **how: Any,
    ):
        super().__init__("PGD", model, **how)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        start = None
        if self.random_start:
            start = _noisy(images, torch.empty_like(images).uniform_(-self.eps, self.eps))
        return self._attacked(images, labels, start, eps=self.eps, alpha=self.alpha, steps=self.steps)


class PGDL2(_Planned):
    """Projected gradient descent in the L2 ball, with steps along the normalised gradient."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        **how: Any,
    ):
        super().__init__("PGDL2", model, **how)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.eps_for_division = eps_for_division

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        start = None
        if self.random_start:
            noise = torch.empty_like(images).normal_()
            length = noise.flatten(1).norm(p=2, dim=1).view(-1, 1, 1, 1)
            noise *= torch.zeros_like(length).uniform_(0, 1) / length * self.eps
            start = _noisy(images, noise)
        numbers = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        return self._attacked(images, labels, start, norm="l2", more={"division": self.eps_for_division}, **numbers)


class TPGD(_Planned):
    """PGD on the divergence from the clean prediction, as TRADES attacks (arXiv 1901.08573); it needs no labels."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        **how: Any,
    ):
        super().__init__("TPGD", model, **how)
        self.eps, self.alpha, self.steps = eps, alpha, steps
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        images, labels = self._own(images, None)
        start = _noisy(images, 0.001 * torch.randn_like(images))
        return self._attacked(images, labels, start, eps=self.eps, alpha=self.alpha, steps=self.steps, loss="kl")


class MIFGSM(_Planned):
    """Steps along the sign of an accumulated gradient (arXiv 1710.06081)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        **how: Any,
    ):
        super().__init__("MIFGSM", model, **how)
        self.eps, self.alpha, self.steps, self.decay = eps, alpha, steps, decay

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        numbers = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps, "momentum": self.decay}
        return self._attacked(images, labels, None, **numbers)


class APGD(_Planned):
    """Auto-PGD (arXiv 2003.01690): what is fooled in a restart stays; images that are not fooled come back clean.

    Raises:
        NotImplementedError: ``verbose``.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        **how: Any,
    ):
        super().__init__("APGD", model, **how)
        check_choice("norm", norm, ("Linf", "L2"))
        check_choice("loss", loss, _LOSSES)
        if verbose:
            raise NotImplementedError("verbose=True: nothing is printed; twins_fast.evaluation measures attacks")
        self.norm, self.eps, self.steps, self.n_restarts = norm, eps, steps, n_restarts
        self.seed, self.loss, self.eot_iter, self.thr_decr, self.verbose = seed, loss, eot_iter, rho, verbose
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._own(images, labels)
        network = self._network()
        autocast = nullcontext() if self.amp_dtype is None else torch.autocast(images.device.type, self.amp_dtype)
        with in_mode(network, training=self._model_training), autocast:
            network = self._differentiable(network, images)
            with torch.no_grad():
                adversarial, left = images.clone(), network(images).argmax(1) == labels
            torch.manual_seed(self.seed)
            for _ in range(self.n_restarts):
                rows = left.nonzero()[:, 0]
                if not len(rows):
                    break
                evaluate = functools.partial(self._evaluated, network, labels[rows])
                found, fooled = Search(evaluate, self.norm, self.eps, self.steps, self.thr_decr).run(images[rows])
                adversarial[rows[fooled]], left[rows[fooled]] = found[fooled], False
        return adversarial

    def _differentiable(self, network: nn.Module, images: Tensor) -> nn.Module:
        """The network as the engine runs it, or itself."""
        if self.engine == "eager":
            return network
        fast = accelerate(network, self.amp_dtype)
        if self.engine == "plan" and (found := fast.explain(images)).engine != "plan":
            raise RuntimeError(f"engine='plan': {found.reason}")
        return fast

    def _evaluated(self, network: nn.Module, labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, their gradient, which is the mean of ``eot_iter`` passes, and whether the network is right."""
        x = x.detach().requires_grad_()
        total = torch.zeros_like(x)
        for _ in range(self.eot_iter):
            logits = network(x).float()
            losses = _LOSSES[self.loss](logits, labels)
            total += torch.autograd.grad(losses.sum(), x)[0]
        return losses.detach(), total / float(self.eot_iter), logits.argmax(1) == labels


def _ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio, which three classes are needed for."""
    order = logits.sort(1).values
    own = logits.gather(1, labels[:, None])[:, 0]
    first = (logits.argmax(1) == labels).float()
    return -(own - order[:, -2] * first - order[:, -1] * (1.0 - first)) / (order[:, -1] - order[:, -3] + 1e-12)


_LOSSES: dict[str, Callable[..., Tensor]] = {"ce": functools.partial(F.cross_entropy, reduction="none"), "dlr": _ratio}
