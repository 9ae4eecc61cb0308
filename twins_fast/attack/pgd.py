"""Projected gradient descent on the input, with the model put back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attack import objectives
from twins_fast.modes import in_mode
from twins_fast.validation import (
    check_choice,
    check_images,
    check_labels,
    check_not_negative,
    check_running_statistics,
    checked_logits,
)

NORMS = ("linf", "l2", "l2-sign")
LOSSES = ("ce", "kl", "dlr")
BN_MODES = ("eval", "train")
STARTS = (True, False, "normal")
_TINY = 1e-12


class PGD:
    """Projected gradient descent (Madry et al., arXiv 1706.06083) inside an eps-ball and [0, 1].

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes]; any normalisation is inside.
        eps: radius of the ball, in pixel units of [0, 1].
        alpha: step size, in the same units.
        steps: number of gradient steps.
        random_start: True for uniform noise (in the cube for ``linf`` and ``l2-sign``, in the ball
            for ``l2``), False for the image itself, ``"normal"`` for 0.001 * N(0, 1) as in TRADES.
        norm: ``"linf"`` (sign steps), ``"l2"`` (normalised gradient steps) or ``"l2-sign"`` (sign
            steps, L2 projection: the ``l2`` of the published TWINS code).
        loss: ``"ce"``, ``"kl"`` (against the clean prediction) or ``"dlr"``.
        bn_mode: ``"eval"`` attacks the network as it is evaluated; ``"train"`` attacks it in train
            mode, which updates running statistics at every step.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast; None
            follows the surrounding autocast state.
        generator: of the random start; the noise is drawn on the generator's device (the CPU's
            default generator if None) and moved.
        targeted: labels are targets, and the loss towards them is minimised.

    Raises:
        ValueError: an unknown name, a negative eps, alpha or steps, ``targeted`` with ``"kl"``.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool | str = True,
        norm: str = "linf",
        loss: str = "ce",
        bn_mode: str = "eval",
        amp_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        targeted: bool = False,
    ):
        check_not_negative(eps=eps, alpha=alpha, steps=steps)
        if not isinstance(steps, Integral):
            raise ValueError(f"steps must be an integer, got {steps!r}")
        check_choice("norm", norm, NORMS)
        check_choice("loss", loss, LOSSES)
        check_choice("bn_mode", bn_mode, BN_MODES)
        check_choice("random_start", random_start, STARTS)
        check_choice("amp_dtype", amp_dtype, (None, torch.bfloat16, torch.float16))
        if targeted and loss == "kl":
            raise ValueError("targeted=True has no meaning with loss='kl', which uses no labels")
        self.model = model
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start if random_start == "normal" else bool(random_start)
        self.norm = norm
        self.loss = loss
        self.bn_mode = bn_mode
        self.amp_dtype = amp_dtype
        self.generator = generator
        self.targeted = targeted

    def __call__(self, images: Tensor, labels: Tensor, x_init: Tensor | None = None) -> Tensor:
        """Attack ``images``.

        Args:
            images: [N, C, H, W] floating point in [0, 1].
            labels: [N] int64, true classes (targets if ``targeted``).
            x_init: where to start, instead of the random start; same shape, dtype and device as images.

        Returns:
            Adversarial images like ``images``, detached. Every module's train/eval flag and every
            parameter's ``requires_grad`` is as before, also if the model raises.

        Raises:
            TypeError, ValueError: images outside [0, 1], not floating point or with NaN; labels of
                the wrong length, dtype or range; a model on another device; a batch norm without
                running statistics in eval mode.
        """
        check_images(images, self.model)
        largest_label = check_labels(labels, images)
        if self.bn_mode == "eval":
            check_running_statistics(self.model)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients, which torch.inference_mode() rules out; use torch.no_grad()")
        images = images.detach()
        x = self._start(images) if x_init is None else _checked_start(x_init, images)
        if images.shape[0] == 0:
            return x
        with in_mode(self.model, training=self.bn_mode == "train"), _without_parameter_gradients(self.model):
            run = self._runner(len(images), largest_label)
            objective = self._objective(images, labels, run)
            for _ in range(self.steps):
                x = self._step(x, self._gradient(x, run, objective))
                x = self._project(images, x)
        return x if self.steps else self._project(images, x)

    def _start(self, images: Tensor) -> Tensor:
        if self.random_start is False:
            return images.clone()
        device = "cpu" if self.generator is None else self.generator.device
        noise = torch.empty(images.shape, dtype=images.dtype, device=device)
        if self.random_start == "normal":  # not clamped in TRADES either; the first projection does it
            return images + 0.001 * noise.normal_(generator=self.generator).to(images.device)
        if self.norm == "l2":
            direction = noise.normal_(generator=self.generator)
            radius = torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=device, generator=self.generator)
            dimensions = images[0].numel()
            noise = direction / _l2_norm(direction).clamp_min(_TINY) * self.eps * radius ** (1 / dimensions)
        else:
            noise.uniform_(-self.eps, self.eps, generator=self.generator)
        return (images + noise.to(images.device)).clamp_(0, 1)

    def _runner(self, rows: int, largest_label: int) -> Callable[[Tensor], Tensor]:
        """The function images -> checked logits."""

        def run(x: Tensor) -> Tensor:
            amp = nullcontext() if self.amp_dtype is None else torch.autocast(x.device.type, self.amp_dtype)
            with amp:
                logits = self.model(x)
            return checked_logits(logits, rows, largest_label)

        return run

    def _objective(self, images: Tensor, labels: Tensor, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function logits -> scalar whose gradient is followed."""
        if self.loss == "kl":
            with torch.no_grad():
                reference = F.softmax(run(images), 1)
            per_sample = objectives.kl_divergence
        else:
            per_sample = objectives.cross_entropy if self.loss == "ce" else objectives.difference_of_logits_ratio
            reference = labels
        # The steps do not depend on the scale: under autocast the sum keeps small gradients from
        # underflowing; in full precision the mean gives the published code's very bits.
        half = self.amp_dtype is not None or torch.is_autocast_enabled(images.device.type)
        reduce = torch.sum if half else torch.mean
        sign = -1 if self.targeted else 1
        return lambda logits: sign * reduce(per_sample(logits, reference))

    def _gradient(self, x: Tensor, run: Callable[[Tensor], Tensor], objective: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(objective(run(x)), x)[0]

    def _step(self, x: Tensor, gradient: Tensor) -> Tensor:
        if self.norm == "l2":
            return x + self.alpha * gradient / _l2_norm(gradient).clamp_min(_TINY)
        return x + self.alpha * gradient.sign()

    def _project(self, images: Tensor, x: Tensor) -> Tensor:
        """Into the ball around ``images``, then into [0, 1]."""
        if self.norm == "linf":
            x = x.clamp(images - self.eps, images + self.eps)
        else:
            offset = x - images
            length = _l2_norm(offset)
            x = torch.where(length > self.eps, images + offset / length * self.eps, x)
        return x.clamp_(0, 1)


def named_attack(name: str, model: nn.Module, **options) -> PGD:
    """The inner adversary of a method, by name.

    Args:
        name: ``"published"`` (cross-entropy, uniform start: what the TWINS code uses for every
            method) or ``"trades"`` (KL divergence, 0.001 * N(0, 1) start: the original TRADES one).
        model, options: of :class:`PGD`.
    """
    check_choice("attack", name, ADVERSARIES)
    return PGD(model, **{**ADVERSARIES[name], **options})


ADVERSARIES: dict[str, dict] = {"published": {}, "trades": {"loss": "kl", "random_start": "normal"}}


def _l2_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _checked_start(x_init: Tensor, images: Tensor) -> Tensor:
    if x_init.shape != images.shape or x_init.dtype != images.dtype or x_init.device != images.device:
        raise ValueError(
            f"x_init must be like images ({list(images.shape)}, {images.dtype}, {images.device}), "
            f"got {list(x_init.shape)}, {x_init.dtype}, {x_init.device}"
        )
    if not x_init.isfinite().all():
        raise ValueError("x_init holds values that are not finite")
    return x_init.detach().clone()


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Switch parameter gradients off; put them back exactly."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
