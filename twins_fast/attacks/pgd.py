"""Projected gradient descent on the input, with the model put back exactly as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import objectives
from twins_fast.attacks.engine.cache import PlanCache, plans_of
from twins_fast.attacks.engine.explain import Explanation, explain
from twins_fast.attacks.engine.memory import out_of_memory
from twins_fast.attacks.engine.nodes import in_one_line
from twins_fast.attacks.engine.passes import Pass
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.watch import is_compiled, unwrapped
from twins_fast.deferred import check_values, raise_found
from twins_fast.devices import capturing, compute_dtype
from twins_fast.models.clamp import NOTE, ClampMode
from twins_fast.nn.guards import random_numbers_restored
from twins_fast.nn.modes import check_running_statistics, in_mode
from twins_fast.options import fraction_of_255
from twins_fast.validation import (
    check_amp_dtype,
    check_choice,
    check_classes,
    check_images,
    check_integer,
    check_labels,
    check_not_negative,
    check_radius,
    checked_logits,
)

NORMS = ("linf", "l2", "l2-sign")
LOSSES = ("ce", "kl", "dlr")
BN_MODES = ("eval", "train")
STARTS = (True, False, "normal")
ENGINES = ("auto", "eager", "plan")
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
        generator: of the random start; the noise is drawn on its device and moved. None: the default generator of the
            images' device.
        targeted: labels are targets, and the loss towards them is minimised.
        engine: ``"plan"`` runs the model's evaluation forward as an explicit program, batch norms folded into the
            convolutions, without autograd (docs/attack.md); ``"eager"`` calls the model; ``"auto"`` takes the plan if
            the model can be planned, on a CPU and on a GPU that has qualified for it (``twins-fast qualify``), and goes
            on in eager mode, with a warning, if an error occurs in the engine. :meth:`explain` reports which one runs,
            and why. Every call sees the current state of the model (but see :meth:`forget`). Attacks on the same model
            share its plans and take turns.
        chunk_size: how many images go through all steps of the plan at once, from the first to the last attack step;
            memory grows with it. None: as many as fit into the last cache of a CPU, all on a GPU.

    Attributes:
        nan_gradients: how many gradients of pixel values were NaN in the last call; such pixels did not move.

    Raises:
        ValueError: an unknown name, a negative eps, alpha or steps, a chunk_size below 1, an L-infinity radius above 1,
            ``targeted`` with ``"kl"``.
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
        engine: str = "auto",
        chunk_size: int | None = None,
    ):
        check_not_negative(eps=eps, alpha=alpha, steps=steps)
        check_integer(steps=steps)
        check_choice("norm", norm, NORMS)
        check_radius(norm, eps)
        check_choice("loss", loss, LOSSES)
        check_choice("bn_mode", bn_mode, BN_MODES)
        check_choice("random_start", random_start, STARTS)
        check_amp_dtype(amp_dtype)
        check_choice("engine", engine, ENGINES)
        if chunk_size is not None:
            check_integer(chunk_size=chunk_size)
            if chunk_size < 1:
                raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if engine == "plan" and bn_mode == "train":
            raise ValueError("engine='plan' needs bn_mode='eval': batch statistics cannot be folded")
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
        self.engine = engine
        self.chunk_size = chunk_size
        self._nan_gradients: Tensor | int = 0
        self._clamp_is_known = False  # once it is, the user has been told of it

    @property
    def nan_gradients(self) -> int:
        count = int(self._nan_gradients)
        raise_found()  # all that the attack has computed is there
        return count

    def __repr__(self) -> str:
        options = {name: repr(getattr(self, name)) for name in list(inspect.signature(PGD).parameters)[1:]}
        options |= {"eps": fraction_of_255(self.eps), "alpha": fraction_of_255(self.alpha)}
        shown = [f"{name}={text}" for name, text in options.items()]
        return f"{type(self).__name__}({', '.join([type(self.model).__name__, *shown])})"

    @property
    def _cache(self) -> PlanCache:
        return plans_of(unwrapped(self.model))

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
                running statistics in eval mode. Values on a GPU are not waited for: what is wrong with them is
                raised by a later call, or when :attr:`nan_gradients` is read.
        """
        check_images(images, self.model)
        return self.perturb(images, labels, check_labels(labels, images), x_init)

    def perturb(self, images: Tensor, labels: Tensor, largest_label: Tensor, x_init: Tensor | None = None) -> Tensor:
        """A call on a batch whose images and labels have been checked; ``largest_label`` is the largest of them."""
        adversarial, nan = self.attack_from(self.start(images, x_init), images, labels, largest_label)
        self.report(nan)
        return adversarial

    def start(self, images: Tensor, x_init: Tensor | None = None) -> Tensor:
        """Where an attack on checked images starts; whatever is random about it is drawn here."""
        if self.bn_mode == "eval":
            check_running_statistics(self.model)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients, which torch.inference_mode() rules out; use torch.no_grad()")
        images = images.detach()
        return self._drawn_start(images) if x_init is None else _checked_start(x_init, images)

    def attack_from(self, x: Tensor, images: Tensor, labels: Tensor, largest_label: Tensor) -> tuple[Tensor, Tensor]:
        """The steps from ``x``: the adversarial images, and how many gradients were NaN.

        Reads nothing back from a GPU once it has run there, so that it can be part of a CUDA graph.
        """
        images = images.detach()
        if images.shape[0] == 0:
            return x, torch.zeros((), dtype=torch.int64)
        failure = ""
        with self._cache.lock, in_mode(self.model, training=False):  # which may change parameters
            program = self._program(images)
            if isinstance(program, Program):
                check_classes(largest_label, program.classes)
                try:
                    (x, nan), blocks = self._planned(program, images, labels, x), program.blocks_bounds
                except Exception as error:
                    if self.engine == "plan" or capturing(images.device):  # which the error has ended
                        raise
                    failure, passing = f"the plan failed: {in_one_line(error)}", out_of_memory(error)
                    program.free()
        if failure or not isinstance(program, Program):
            x, nan, blocks = self._eager(images, labels, largest_label, x)
        if failure:  # and not the model or the loss: they would have failed again
            if isinstance(program, Program) and not passing:
                self._cache.refuse(program, failure)
            warnings.warn(f"{failure}; the model was attacked in eager mode", stacklevel=4)
        if blocks and not self._clamp_is_known:
            warnings.warn(NOTE, stacklevel=4)
        self._clamp_is_known = self._clamp_is_known or self.steps > 0
        return x if self.steps else self._project(images, x), nan

    def report(self, nan: Tensor) -> None:
        """Keep how many gradients were NaN in the last attack; where that can be read without waiting, warn of them."""
        self._nan_gradients = nan
        if nan.device.type == "cpu" and nan:
            warnings.warn(f"{self.nan_gradients} gradients of pixel values were NaN; those pixels stay", stacklevel=4)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside the block the working memory of this attack is the caller's: other threads and streams wait."""
        with self._cache.lock, ExitStack() as turns:
            for program in self._cache.programs():
                turns.enter_context(program.in_turn())
            yield

    def memory(self) -> list[object]:
        """What must live as long as a CUDA graph that this attack is a part of."""
        return [(program, program.memory()) for program in self._cache.programs()]

    def explain(self, images: Tensor, labels: Tensor | None = None, timed: bool = False) -> Explanation:
        """How images like these are attacked, layer by layer, and why; ``str()`` of it is a table.

        Args:
            images: [N, C, H, W], as in a call; run if ``timed``, and the first one if the model stays eager.
            labels: not needed; as in a call.
            timed: also measure every step.
        """
        check_images(images, self.model)
        with self._cache.lock, in_mode(self.model, training=False):
            program = self._program(images.detach())
            blocks = program.blocks_bounds if isinstance(program, Program) else self._clamp_blocks(images)
            notes = (NOTE,) if blocks else ()
            return explain(program, unwrapped(self.model), images.detach(), timed, notes)

    def _clamp_blocks(self, images: Tensor) -> bool:
        """Whether a clamp of the images, in a forward of one of them, passes no gradient at 0 and 1."""
        with random_numbers_restored(), torch.no_grad(), ClampMode(images.shape[1], replace=False) as mode:
            unwrapped(self.model)(images[:1])
        return mode.blocks

    def forget(self) -> None:
        """Drop the captured model and its memory, and the reasons why it could not be planned, for all attacks on it.

        Only needed if a forward reads globals or closures, whose changes go unnoticed, or to try again after an error.
        """
        with self._cache.lock:
            self._cache.forget()

    def _program(self, images: Tensor) -> Program | str:
        """What runs the attack, or why it is eager."""
        if self.engine == "eager":
            return "engine='eager'"
        if self.bn_mode == "train":
            return "bn_mode='train' needs batch statistics"
        insist = self.engine == "plan"
        dtype = compute_dtype(self.amp_dtype, images.device)
        program = self._cache.program(unwrapped(self.model), images, dtype, self.chunk_size, insist)
        if insist and not isinstance(program, Program):
            raise RuntimeError(f"engine='plan': {program}")
        return program

    def _planned(self, program: Program, images: Tensor, labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        model = unwrapped(self.model)

        def attack(images: Tensor, labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            program.fold(model)
            gradient, reference = self._logits_gradient(labels, program.classes, lambda: program.logits(images))

            def gradient_of(logits: Tensor, rows: slice) -> Tensor:
                towards_higher_loss = gradient(logits, reference[rows])
                return towards_higher_loss.neg_() if self.targeted else towards_higher_loss

            result = x.clone(memory_format=torch.contiguous_format)
            nan = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            clean = images.contiguous()

            def work(network: Pass, rows: slice) -> None:
                result[rows], nan[rows] = x[rows], 0
                for _ in range(self.steps):
                    direction = gradient_of(network.logits(result[rows]), rows)
                    if self.norm == "linf":
                        network.sign_step(result[rows], clean[rows], direction, self.alpha, self.eps, nan[rows])
                        continue
                    moved, bad = self._moved(clean[rows], result[rows], network.gradient(result[rows], direction))
                    nan[rows] += bad.flatten(1).sum(1)
                    result[rows] = moved

            program.in_parts(len(x), work)
            return result, nan

        options = (self._cache.watch.changes, self.steps, self.alpha, self.eps, self.norm, self.loss, self.targeted)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            adversarial, nan = program.graphed(options, attack, (images, labels, x))
            like_x = adversarial if adversarial.stride() == x.stride() else torch.empty_like(x).copy_(adversarial)
            return like_x, nan.sum()

    def _eager(self, images: Tensor, labels: Tensor, largest_label: Tensor, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The attacked images, NaN gradients, and whether a clamp of the images passes no gradient at 0 and 1."""
        # Code of torch.compile would be compiled again inside a mode.
        known = self._clamp_is_known or any(map(is_compiled, self.model.modules()))
        clamps = ClampMode(images.shape[1], replace=False)
        nan = torch.zeros((), dtype=torch.int64, device=images.device)
        with in_mode(self.model, training=self.bn_mode == "train"), _without_parameter_gradients(self.model):
            run = self._runner(len(images), largest_label)
            objective = self._objective(images, labels, run)
            for step in range(self.steps):
                with nullcontext() if step or known else clamps:
                    gradient = self._gradient(x, run, objective)
                x, bad = self._moved(images, x, gradient)
                nan += bad.sum()
        return x, nan, clamps.blocks

    def _drawn_start(self, images: Tensor) -> Tensor:
        if self.random_start is False:
            return images.clone()
        device = images.device if self.generator is None else self.generator.device
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

    def _runner(self, rows: int, largest_label: Tensor) -> Callable[[Tensor], Tensor]:
        """The function images -> checked logits."""
        unchecked: Tensor | None = largest_label

        def run(x: Tensor) -> Tensor:
            nonlocal unchecked
            amp = nullcontext() if self.amp_dtype is None else torch.autocast(x.device.type, self.amp_dtype)
            with amp:
                logits = self.model(x)
            logits, unchecked = checked_logits(logits, rows, unchecked), None
            return logits

        return run

    def _per_sample(
        self, labels: Tensor, clean_logits: Callable[[], Tensor]
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """The loss of each sample as a function of logits and a reference, and that reference."""
        if self.loss == "kl":
            with torch.no_grad():
                return objectives.kl_divergence, F.softmax(clean_logits(), 1)
        return objectives.cross_entropy if self.loss == "ce" else objectives.difference_of_logits_ratio, labels

    def _logits_gradient(
        self, labels: Tensor, classes: int, clean_logits: Callable[[], Tensor]
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """The gradient of that loss with respect to the logits as a function of them and a reference; the reference."""
        if self.loss == "kl":
            return objectives.softmax_gradient, F.softmax(clean_logits(), 1)
        if self.loss == "ce":
            return objectives.softmax_gradient, objectives.one_hot(labels, classes)
        return objectives.difference_of_logits_ratio_gradient, labels

    def _objective(self, images: Tensor, labels: Tensor, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function logits -> scalar whose gradient is followed."""
        per_sample, reference = self._per_sample(labels, lambda: run(images))
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

    def _moved(self, images: Tensor, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` after a step, and where the gradient was NaN: there it stays."""
        bad = gradient.isnan()
        moved = self._project(images, self._step(x, gradient.masked_fill(bad, 0)))
        return torch.where(bad, x, moved), bad

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


def named_attack(name: str, model: nn.Module, **options: Any) -> PGD:
    """The inner adversary of a method, by name.

    Args:
        name: ``"ce"`` (cross-entropy, uniform start: what the TWINS code uses for every method)
            or ``"trades"`` (KL divergence, 0.001 * N(0, 1) start: the original TRADES one).
        model, options: of :class:`PGD`.
    """
    check_choice("attack", name, ADVERSARIES)
    return PGD(model, **{**ADVERSARIES[name], **options})


Adversary = Literal["ce", "trades"]
ADVERSARIES: dict[str, dict[str, Any]] = {"ce": {}, "trades": {"loss": "kl", "random_start": "normal"}}


def _l2_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _checked_start(x_init: Tensor, images: Tensor) -> Tensor:
    if x_init.shape != images.shape or x_init.dtype != images.dtype or x_init.device != images.device:
        raise ValueError(
            f"x_init must be like images ({list(images.shape)}, {images.dtype}, {images.device}), "
            f"got {list(x_init.shape)}, {x_init.dtype}, {x_init.device}"
        )

    def look(finite: bool) -> None:
        if not finite:
            raise ValueError("x_init holds values that are not finite")

    check_values(x_init.isfinite().all(), look)
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
