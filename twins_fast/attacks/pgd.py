"""Projected gradient descent on the input, with the model put back exactly as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import objectives
from twins_fast.attacks.ascent import RULES, Found, Images, Network, Search, ascend, nothing_found
from twins_fast.attacks.balls import NORMS, Ball, norm_named
from twins_fast.attacks.engine.cache import PlanCache, plans_of
from twins_fast.attacks.engine.explain import Explanation, explain
from twins_fast.attacks.engine.function import as_module, look_again
from twins_fast.attacks.engine.memory import out_of_memory
from twins_fast.attacks.engine.nodes import as_float32, in_one_line
from twins_fast.attacks.engine.passes import Pass
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.watch import Wrapper, is_compiled, unwrapped
from twins_fast.attacks.networks import Eager, Normalised, Passes
from twins_fast.attacks.objectives import Loss, Objective
from twins_fast.deferred import check_values, raise_found
from twins_fast.devices import autocast, capturing, compute_dtype
from twins_fast.models.clamp import NOTE, ClampMode
from twins_fast.models.output import Output, output_of
from twins_fast.nn.guards import random_numbers_restored
from twins_fast.nn.modes import check_running_statistics, in_mode
from twins_fast.options import fraction_of_255
from twins_fast.validation import (
    check_amp_dtype,
    check_bounds,
    check_choice,
    check_classes,
    check_images,
    check_integer,
    check_labels,
    check_not_negative,
    check_radius,
    checked_logits,
    per_image,
)

_LOSSES: dict[str, tuple[Loss, Loss]] = {  # name -> loss and gradient
    "ce": (objectives.cross_entropy, objectives.softmax_gradient),
    "kl": (objectives.kl_divergence, objectives.softmax_gradient),
    "dlr": (objectives.difference_of_logits_ratio, objectives.difference_of_logits_ratio_gradient),
    "margin": (objectives.margin, objectives.margin_gradient),
}
LOSSES = tuple(_LOSSES)
BN_MODES = ("eval", "train")
STARTS = (True, False, "normal")
ENGINES = ("auto", "eager", "plan")
PIXELS = (0.0, 1.0)


class PGD:
    """Projected gradient descent (Madry et al., arXiv 1706.06083) inside an eps-ball and the range of pixel values.

    Where "a number" is written, it may be one per channel, a tensor [C, 1, 1] or [1, C, 1, 1], or per image, [N, 1, 1,
    1] or [N, C, 1, 1]; the balls of the L2 and L1 norms have one radius for all channels.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes]: a module, or a function whose networks are found in its
            closure, globals, arguments (of a ``partial``) or object (of a method); they are treated as a module is.
        eps: radius of the ball, a number in the units of ``bounds``.
        alpha: step size, a number in the same units.
        steps: number of gradient steps.
        random_start: True for uniform noise (in the cube for ``linf`` and ``l2-sign``, in the ball
            for ``l2`` and ``l1``), False for the image itself, ``"normal"`` for 0.001 * N(0, 1) as in TRADES.
        norm: ``"linf"`` (sign steps), ``"l2"`` (normalised gradient steps), ``"l1"`` (steps on the pixel values with
            the largest gradients, arXiv 1904.13000) or ``"l2-sign"`` (sign steps, L2 projection: the ``l2`` of the
            published TWINS code); also ``"Linf"``, ``math.inf``, ``"L2"``, ``2``, ``"L1"``, ``1``.
        loss: ``"ce"``, ``"kl"`` (against the clean prediction), ``"dlr"`` (arXiv 2003.01690), ``"margin"`` (largest
            other logit minus the label's, arXiv 1608.04644), or a function (float32 logits [n, classes], labels [n] or
            [n, classes]) -> [n], which autograd differentiates; it sees all N images, but with ``early_stop`` those
            that are left.
        bn_mode: ``"eval"`` attacks the network as it is evaluated; ``"train"`` attacks it in train
            mode, which updates running statistics at every step.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast; None
            follows the surrounding autocast state. A model of half precision takes images of its type.
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
            memory grows with it. None: as many as fit into the last cache of a CPU, or a few, all on a GPU.
        restarts: number of runs, each from a random start of its own; the result with the highest loss counts.
        best: whether the iterate of the highest loss counts, the start among them, and not the last one; one more
            forward pass.
        early_stop: whether an image stays at the first iterate that fools the model (its largest logit is not the
            label's or, if ``targeted``, is); it takes part in no further pass.
        momentum: decay of the accumulated gradient of MI-FGSM (arXiv 1710.06081), 0 for none.
        step_rule: ``"fixed"`` for steps of length alpha, ``"apgd"`` for those of APGD (arXiv 2003.01690), which choose
            their own length, begin with 2 * eps and return the best iterate.
        bounds: the lowest and the highest pixel value, two numbers, such as (0, 255).
        mean: if images are normalised, (pixels - mean) / std, C numbers in the units of ``bounds``: eps, alpha and
            bounds then hold for pixels, adversarial images are normalised as well.
        std: goes with ``mean``.
        output: for a model that returns a tuple or a dictionary, the index or the key of the logits, or a function
            that takes them out.

    Attributes:
        nan_gradients: how many gradients of pixel values were NaN in the last call; such pixels did not move.

    Raises:
        TypeError: a model that is no function, a loss or an output that is neither a name nor a function.
        ValueError: an unknown name, a negative eps, alpha or steps, a chunk_size or restarts below 1, an L-infinity
            radius above the range of pixel values, options that exclude each other.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Any],
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        random_start: bool | str = True,
        norm: str | float = "linf",
        loss: str | Loss = "ce",
        bn_mode: str = "eval",
        amp_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        targeted: bool = False,
        engine: str = "auto",
        chunk_size: int | None = None,
        restarts: int = 1,
        best: bool = False,
        early_stop: bool = False,
        momentum: float = 0.0,
        step_rule: str = "fixed",
        bounds: tuple[float | Tensor, float | Tensor] = PIXELS,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        output: Output = None,
    ):
        name: str = norm_named(norm)
        check_not_negative(eps=eps, alpha=alpha, steps=steps, momentum=momentum)
        check_integer(steps=steps)
        check_choice("norm", name, NORMS)
        check_bounds(bounds)
        check_radius(name, eps, bounds)
        if isinstance(loss, str):
            check_choice("loss", loss, LOSSES)
        elif not callable(loss):
            raise TypeError(f"loss must be a name or a function (logits, labels) -> [N], got {type(loss).__name__}")
        check_choice("bn_mode", bn_mode, BN_MODES)
        check_choice("random_start", random_start, STARTS)
        check_amp_dtype(amp_dtype)
        check_choice("engine", engine, ENGINES)
        check_choice("step_rule", step_rule, RULES)
        for option, value in {"chunk_size": chunk_size, "restarts": restarts}.items():
            if value is None:
                continue
            check_integer(**{option: value})
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if engine == "plan" and bn_mode == "train":
            raise ValueError("engine='plan' needs bn_mode='eval': batch statistics cannot be folded")
        if targeted and loss == "kl":
            raise ValueError("targeted=True has no meaning with loss='kl', which uses no labels")
        if restarts > 1 and random_start is False:
            raise ValueError("restarts need a random start: without one they are all the same")
        if step_rule == "apgd" and (momentum or name not in ("linf", "l2")):
            raise ValueError("step_rule='apgd' has a momentum of its own, and is for the norms linf and l2")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        self.model = as_module(model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start if random_start == "normal" else bool(random_start)
        self.norm = name
        self.loss = loss
        self.bn_mode = bn_mode
        self.amp_dtype = amp_dtype
        self.generator = generator
        self.targeted = targeted
        self.engine = engine
        self.chunk_size = chunk_size
        self.restarts = restarts
        self.best = best
        self.early_stop = early_stop
        self.momentum = momentum
        self.step_rule = step_rule
        self.bounds = (bounds[0], bounds[1])
        self.mean = mean
        self.std = std
        self.output = output
        self._nan_gradients: Tensor | int = 0
        self._clamp_is_known = False  # once it is, the user has been told of it

    @property
    def nan_gradients(self) -> int:
        count = int(self._nan_gradients)
        raise_found()  # all that the attack has computed is there
        return count

    @property
    def looks_between_passes(self) -> str:
        """Which option needs values between the passes, so that they are no single CUDA graph; "" if none does."""
        if not isinstance(self.loss, str):
            return "loss is a function"
        if self.early_stop:
            return "early_stop=True"
        if self.mean is not None:
            return "images are normalised"
        numbers = {"eps": (self.eps,), "alpha": (self.alpha,), "bounds": self.bounds}
        tensors = [name for name, values in numbers.items() if any(isinstance(value, Tensor) for value in values)]
        return f"{tensors[0]} is a tensor" if tensors else ""

    def __repr__(self) -> str:
        options = {name: repr(getattr(self, name)) for name in list(inspect.signature(PGD).parameters)[1:]}
        lengths = {"eps": self.eps, "alpha": self.alpha}
        options |= {name: fraction_of_255(value) for name, value in lengths.items() if not isinstance(value, Tensor)}
        shown = [f"{name}={text}" for name, text in options.items()]
        return f"{type(self).__name__}({', '.join([type(self.model).__name__, *shown])})"

    @property
    def _cache(self) -> PlanCache:
        return plans_of(unwrapped(self.model))

    def __call__(self, images: Tensor, labels: Tensor, x_init: Tensor | None = None) -> Tensor:
        """Attack ``images``.

        Args:
            images: [N, C, H, W] floating point within ``bounds`` or, with ``mean`` and ``std``, normalised.
            labels: [N] int64, true classes (targets if ``targeted``); for ``ce`` and ``kl`` also [N, classes] floating
                point, probabilities, by whose largest an early stop judges.
            x_init: where to start (the first time), instead of the random start; same shape, dtype and device as
                images.

        Returns:
            Adversarial images like ``images``, detached. Every module's train/eval flag and every
            parameter's ``requires_grad`` is as before, also if the model raises.

        Raises:
            TypeError, ValueError: images outside the bounds, not floating point or with NaN; labels of
                the wrong length, dtype or range; a model on another device, or that returns no logits; a batch norm
                without running statistics in eval mode; an option with a tensor that does not fit the images. Values on
                a GPU are not waited for: what is wrong with them is raised by a later call, or when
                :attr:`nan_gradients` is read.
        """
        look_again(self.model)
        self._check_images(images)
        return self.perturb(images, labels, check_labels(labels, images), x_init)

    def perturb(self, images: Tensor, labels: Tensor, largest_label: Tensor, x_init: Tensor | None = None) -> Tensor:
        """A call on a batch whose images and labels have been checked; ``largest_label`` is the largest of them."""
        adversarial, nan = self.attack_from(self.start(images, x_init), images, labels, largest_label)
        self.report(nan)
        return adversarial

    def start(self, images: Tensor, x_init: Tensor | None = None) -> Tensor:
        """Where an attack on checked images starts, [N, ...] or [restarts, N, ...]; what is random is drawn here."""
        look_again(self.model)
        if self.bn_mode == "eval":
            check_running_statistics(self.model)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients, which torch.inference_mode() rules out; use torch.no_grad()")
        images = images.detach()
        clean, ball = self._pixels(images), self._ball(images)
        starts = [] if x_init is None else [self._pixels(_checked_start(x_init, images))]
        starts += [self._drawn_start(clean, ball) for _ in range(self.restarts - len(starts))]
        return starts[0] if self.restarts == 1 else torch.stack(starts)

    def attack_from(self, x: Tensor, images: Tensor, labels: Tensor, largest_label: Tensor) -> tuple[Tensor, Tensor]:
        """The steps from ``x``: the adversarial images, and how many gradients were NaN.

        Reads nothing back from a GPU once it has run there, so that it can be part of a CUDA graph, unless
        :attr:`looks_between_passes`.
        """
        images = images.detach()
        if images.shape[0] == 0:
            return images.clone(), torch.zeros((), dtype=torch.int64)
        failure = ""
        with self._cache.lock, in_mode(self.model, training=False):  # which may change parameters
            program = self._program(images)
            if isinstance(program, Program):
                check_classes(largest_label, program.classes, labels)
                try:
                    (x, nan), blocks = self._planned(program, images, labels, x), program.blocks_bounds
                except Exception as error:
                    if self.engine == "plan" or capturing(images.device):  # which the error has ended
                        raise
                    failure, passing = f"the plan failed: {in_one_line(error)}", out_of_memory(error)
                    program.free()
        if failure or not isinstance(program, Program):
            x, nan, blocks = self._eager(images, labels, largest_label, x)
            if self.engine == "auto" and self.bn_mode == "eval":
                self._cache.tell("the model is attacked in eager mode", stacklevel=4)
        if failure:  # and not the model or the loss: they would have failed again
            if isinstance(program, Program) and not passing:
                self._cache.refuse(program, failure)
            warnings.warn(f"{failure}; the model was attacked in eager mode", stacklevel=4)
        if blocks and not self._clamp_is_known:
            warnings.warn(NOTE, stacklevel=4)
        self._clamp_is_known = self._clamp_is_known or self.steps > 0
        if not self.steps:
            x = self._ball(images).project(x.clone(), self._pixels(images))
        x = self._normalised(x)
        return x if x.stride() == images.stride() else torch.empty_like(images).copy_(x), nan

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
        look_again(self.model)
        self._check_images(images)
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

        Only needed if a forward reads what is not looked at (docs/attack.md), or to try again after an error.
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
        dtype = compute_dtype(self.amp_dtype, images)
        program = self._cache.program(
            unwrapped(self.model), images, dtype, self.chunk_size, insist, bool(self.looks_between_passes), self.output
        )
        if insist and not isinstance(program, Program):
            raise RuntimeError(f"engine='plan': {program}")
        if isinstance(program, Program) and not insist and not program.pays(len(images), self.steps * self.restarts):
            return "so few steps on so few images do not pay for folding the weights"
        return program

    def _planned(self, program: Program, images: Tensor, labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        model, search = unwrapped(self.model), self._search(images, closed=True)
        about, dtype = self._cache.watch.changes, images.dtype
        images, x = as_float32(images), as_float32(x)

        def attack(images: Tensor, labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            program.fold(model)
            batch = self._batch(images.contiguous(), labels)
            if self.loss == "ce" and not labels.is_floating_point():
                batch.reference = objectives.one_hot(labels, program.classes)
            if self.looks_between_passes:
                drops = program.plan.per_sample and not capturing(images.device)
                found = self._run(Passes(program, model, about), x, batch, search, drops)
                return found.x, found.nan
            found = nothing_found(x[0] if x.dim() == 5 else x.contiguous())

            def work(network: Pass, rows: slice) -> None:
                if self._is_fused:
                    self._fused(network, search, found, batch, rows, x)
                else:
                    found.put(rows, self._run(network, x[..., rows, :, :, :], batch.at(rows), search))

            program.in_parts(len(images), work)
            return found.x, found.nan

        numbers = (self.steps, self.alpha, self.eps, self.bounds, self.momentum)
        options = (about, *numbers, self.norm, self.loss, self.targeted, self.step_rule, self.best)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self.looks_between_passes:
                with program.in_turn():
                    adversarial, nan = attack(images, labels, x)
            else:
                adversarial, nan = program.graphed(options, attack, (images, labels, x))
            program.folded = self._cache.watch.state()
            return adversarial.to(dtype), nan.sum()

    @property
    def _is_fused(self) -> bool:
        """Whether a kernel has the step of the pixels; never if the passes are looked between."""
        usual = (self.norm, self.momentum, self.step_rule, self.restarts) == ("linf", 0, "fixed", 1)
        return usual and tuple(self.bounds) == PIXELS and not self.best

    def _fused(self, network: Pass, search: Search, found: Found, batch: Images, rows: slice, start: Tensor) -> None:
        """The search for the rows, with the steps of the pixels by the engine."""
        x, clean, nan = found.x[rows], batch.clean[rows], found.nan[rows]
        x.copy_(start[rows]), nan.zero_()  # memory may have run out in the middle before
        reference = self._reference(network, batch.clean[rows], batch.reference[rows])
        for _ in range(search.steps):
            slope = search.objective.gradient(network.logits(x), reference)
            network.sign_step(x, clean, slope, float(self.alpha), float(self.eps), nan)

    def _eager(self, images: Tensor, labels: Tensor, largest_label: Tensor, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The attacked images, NaN gradients, and whether a clamp of the images passes no gradient at 0 and 1."""
        # Code of torch.compile would be compiled again inside a mode; an accelerated network has clamps of its checks.
        known = self._clamp_is_known or any(is_compiled(m) or isinstance(m, Wrapper) for m in self.model.modules())
        clamps = ClampMode(images.shape[1], replace=False)
        training = self.bn_mode == "train"
        with in_mode(self.model, training=training), _without_parameter_gradients(self.model), torch.no_grad():
            network = Eager(self._runner(largest_label), nullcontext() if known else clamps)
            drops = not training and not capturing(images.device)
            search = self._search(images, closed=False)
            found = self._run(network, x, self._batch(images, labels), search, drops)
        return found.x, found.nan.sum(), clamps.blocks

    def _run(self, network: Network, x: Tensor, batch: Images, search: Search, drops: bool = False) -> Found:
        """All restarts, from ``x`` [n, ...] or [restarts, n, ...]."""
        if self.mean is not None:
            network = Normalised(network, *self._normalisation(batch.clean))
        batch.reference = self._reference(network, batch.clean, batch.reference)
        starts = x[None] if x.dim() == 4 else x
        found = ascend(network, starts[0], batch, search, drops)
        for start in starts[1:]:
            if search.early_stop and drops:
                left = (~found.fooled).nonzero()[:, 0]
                if len(left):
                    those = found.at(left)
                    those.take_higher(ascend(network, start[left], batch.at(left), search, drops), early_stop=True)
                    found.put(left, those)
            else:
                found.take_higher(ascend(network, start, batch, search), search.early_stop)
        return found

    def _search(self, images: Tensor, closed: bool) -> Search:
        """How to search; ``closed`` for a gradient of the loss in closed form, where there is one."""
        values, slope = _LOSSES[self.loss] if isinstance(self.loss, str) else (self.loss, None)
        # The steps do not depend on the scale: under autocast the sum keeps small gradients from
        # underflowing; in full precision the mean gives the published code's very bits.
        half = closed or self.amp_dtype is not None or torch.is_autocast_enabled(images.device.type)
        half = half or images.dtype.itemsize == 2
        reduce = torch.sum if half else torch.mean
        objective = Objective(values, slope if closed else None, -1 if self.targeted else 1, reduce)
        options = (self.momentum, self.step_rule, self.best, self.early_stop)
        return Search(self.steps, objective, self.targeted, *options, judged=self.restarts > 1)

    def _batch(self, images: Tensor, labels: Tensor) -> Images:
        classes = labels
        if labels.is_floating_point():
            if self.loss in ("dlr", "margin"):
                raise TypeError(f"loss={self.loss!r} needs a class for every image, got probabilities as labels")
            classes, labels = labels.argmax(1), labels.to(images.dtype)
        alpha = per_image("alpha", self.alpha, images)
        return Images(self._pixels(images), labels, classes, self._ball(images), alpha)

    def _reference(self, network: Network, clean: Tensor, labels: Tensor) -> Tensor:
        """What the loss compares logits with."""
        return F.softmax(network.logits(clean), 1) if self.loss == "kl" else labels

    def _ball(self, images: Tensor) -> Ball:
        numbers = zip(("eps", "bounds", "bounds"), (self.eps, *self.bounds), strict=True)
        ball = Ball(self.norm, *(per_image(name, number, images) for name, number in numbers))
        if self.norm != "linf" and isinstance(ball.eps, Tensor) and ball.eps.shape[1] != 1:
            shape = list(ball.eps.shape)
            raise ValueError(f"norm={self.norm!r} has one radius for all channels, got eps of shape {shape}")
        return ball

    def _normalisation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [1, C, 1, 1]."""
        made = []
        for name, value in (("mean", self.mean), ("std", self.std)):
            numbers = torch.as_tensor(value, dtype=images.dtype, device=images.device).flatten()
            if len(numbers) not in (1, images.shape[1]):
                raise ValueError(f"{name} must have {images.shape[1]} numbers, one per channel, got {len(numbers)}")
            made.append(numbers.view(1, -1, 1, 1))
        return made[0], made[1]

    def _pixels(self, images: Tensor) -> Tensor:
        """In the units of ``bounds``, and within them."""
        return images if self.mean is None else self._ball(images).clamp(self._denormalised(images))

    def _denormalised(self, images: Tensor) -> Tensor:
        mean, std = self._normalisation(images)
        return images * std + mean

    def _normalised(self, pixels: Tensor) -> Tensor:
        if self.mean is None:
            return pixels
        mean, std = self._normalisation(pixels)
        return (pixels - mean) / std

    def _check_images(self, images: Tensor) -> None:
        check_images(images, self.model, self.bounds, None if self.mean is None else self._denormalised)

    def _drawn_start(self, images: Tensor, ball: Ball) -> Tensor:
        if self.random_start is False:
            return images.clone()
        if self.random_start == "normal":  # not clamped in TRADES either; the first projection does it
            device = images.device if self.generator is None else self.generator.device
            noise = torch.empty(images.shape, dtype=images.dtype, device=device).normal_(generator=self.generator)
            return images + 0.001 * noise.to(images.device)
        return ball.clamp(images + ball.noise(images, self.generator))

    def _runner(self, largest_label: Tensor) -> Callable[[Tensor], Tensor]:
        """The function images -> checked logits."""
        unchecked: Tensor | None = largest_label

        def run(x: Tensor) -> Tensor:
            nonlocal unchecked
            with autocast(self.amp_dtype, x.device):
                logits = output_of(self.model(x), self.output)
            logits, unchecked = checked_logits(logits, len(x), unchecked), None
            return logits

        return run


def named_attack(name: str, model: nn.Module, **options: Any) -> PGD:
    """The inner adversary of a method, by name.

    Args:
        name: ``"ce"`` (cross-entropy, uniform start: what the TWINS code uses for every method)
            or ``"trades"`` (KL divergence, 0.001 * N(0, 1) start: the original TRADES one).
        model: as :class:`PGD` takes it.
        **options: of :class:`PGD`.

    Raises:
        ValueError: an unknown name; else as :class:`PGD`.
    """
    check_choice("attack", name, ADVERSARIES)
    return PGD(model, **{**ADVERSARIES[name], **options})


Adversary = Literal["ce", "trades"]
ADVERSARIES: dict[str, dict[str, Any]] = {"ce": {}, "trades": {"loss": "kl", "random_start": "normal"}}


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
