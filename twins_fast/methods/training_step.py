"""A whole training step, from the attack to the optimiser, as one CUDA graph where that is possible."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from twins_fast.attacks import PGD
from twins_fast.attacks.engine import cuda_graph
from twins_fast.attacks.engine.nodes import NotCaptured, tensors_of
from twins_fast.attacks.engine.watch import Watch, is_compiled
from twins_fast.devices import autocast, has_graphs
from twins_fast.methods.awp import perturb_weights
from twins_fast.methods.base import Attack, Beside, Logits, Method
from twins_fast.methods.labels import smoothed
from twins_fast.methods.registry import METHODS
from twins_fast.nn.guards import has_global_hooks, has_hooks
from twins_fast.nn.modes import modules_of
from twins_fast.nn.wings import twin_layers, two_wing_layers
from twins_fast.ops.group import Group, all_true, average_, world_size
from twins_fast.validation import check_amp_dtype, check_choice, check_not_negative, checked_logits

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class TrainingStep:
    """One step of adversarial training: attack, forward and backward pass, optimiser.

    On a GPU a step of a new kind (another shape, mode or option) runs as it is and is then captured as a CUDA graph,
    which later ones replay: the batch, the attack's random start and the learning rates are its inputs, and nothing
    waits for the device. Where a step cannot be captured it is the same function without a graph.

    A loss that is not finite changes neither parameters nor the optimiser's state: read it before you save anything.
    After a step the gradients are None.

    Args:
        model: in train mode; with two-wing layers in mix mode for the two-wing methods. ``lwf`` takes it for the
            pre-trained network as it is now.
        optimizer: of the model's parameters. What a graph needs is ``torch.optim.SGD(..., fused=True)`` or
            ``Adam`` or ``AdamW`` with ``fused=True, capturable=True``.
        method: a method, or its name, for its default options.
        attack: as in :func:`twins_fast.adversarial_loss`; None for the method's own adversary. What a graph needs is a
            :class:`twins_fast.PGD` of this model.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` to run attack and model under autocast.
        scaler: of the gradients, for float16.
        awp: how far, relative to their length, weights are moved to where the loss is worst before it is taken
            (:func:`twins_fast.methods.awp.perturb_weights`); an attribute that may be changed between steps.
        label_smoothing: part of each label, in [0, 1), that the loss spreads over all classes; the attack does not.
        gradient_norms: whether the metrics hold ``gradient_norms``, of each parameter's gradient of the loss, in the
            order of the optimiser, [parameters]; 0 where there is no gradient.
        process_group: processes that train copies of one network, each on its part of the batch, all parts of one
            size: a ``torch.distributed`` group, ``"world"`` for the default one, or None for this process alone.
            Gradients and running statistics are those of all of them on average, and a loss that is not finite in one
            of them stops the step in all. The attack needs nobody else. Batch statistics stay those of each process's
            rows (:func:`twins_fast.convert_sync_twin_bn` shares them). The metrics are those of this process.

    Attributes:
        reason: why the last step ran without a graph; empty if there is one for the next of its kind.

    Raises:
        ValueError: an unknown method or dtype, a negative option, label smoothing that the method's loss cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        method: Method | str,
        attack: Attack | None = None,
        amp_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        awp: float = 0.0,
        label_smoothing: float = 0.0,
        gradient_norms: bool = False,
        process_group: Group = None,
    ):
        if isinstance(method, str):
            check_choice("method", method, METHODS)
            method = METHODS[method]()
        check_amp_dtype(amp_dtype)
        check_not_negative(awp=awp, label_smoothing=label_smoothing)
        if label_smoothing:
            method.check_soft_labels("label smoothing")
        self.model = model
        self.optimizer = optimizer
        self.method = method
        self.attack: Any = method.attack(model) if attack is None else attack
        self.kept = method.keep(model, self.attack)
        self.amp_dtype = amp_dtype
        self.scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
        self.awp = awp
        self.label_smoothing = label_smoothing
        self.gradient_norms = gradient_norms
        self.process_group = process_group if process_group is None or world_size(process_group) > 1 else None
        self.reason = "there has been no step"
        self._graphs: cuda_graph.Graphs | None = None
        self._watch = Watch()
        self._model_obstacles: dict[torch.device, str] = {}  # of a model that has not changed since
        self._names: list[str] = []  # of the metrics
        self._logits: Tensor | None = None

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        lr: float | None = None,
        source: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            images: [B, C, H, W] floating point in [0, 1].
            labels: [B] int64.
            lr: the learning rate of all parameters; None leaves it to the optimiser's groups.
            source: images and labels of the pre-training, for ``joint``.

        Returns:
            Detached metrics: ``loss`` and the method's own, of the network before the step. Reading one waits for it.

        Raises:
            TypeError, ValueError: as in :func:`twins_fast.adversarial_loss`.
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        method, model, attack = self.method, self.model, self._own_attack()
        beside = Beside(self.kept, source)
        largest_label = method.check(model, images, labels)  # reads values: never part of a graph
        start = images if attack is None else attack.start(images)
        rates = _rates(self.optimizer, images.device) if _skips_on_device(self.optimizer) else ()

        def step(images: Tensor, labels: Tensor, start: Tensor, *rates: Tensor) -> tuple[Tensor, ...]:
            self._drop_gradients()
            nan: list[Tensor] = []
            with autocast(self.amp_dtype, images.device):
                if attack is None:
                    adversarial = method.perturb(self.attack, model, images, labels, largest_label)
                else:
                    adversarial, *nan = attack.attack_from(start, images, labels, largest_label)

            def forward() -> tuple[Logits, Tensor, Tensor]:
                with autocast(self.amp_dtype, images.device):
                    logits = method.forward(model, images, adversarial, largest_label, beside)  # [frozen | adaptive]
                    targets = smoothed(labels, logits.adversarial.shape[1], self.label_smoothing)
                    return logits, targets, method.loss(logits, targets)

            restore = _nothing
            if self.awp:
                restore = perturb_weights(model, lambda: self.scaler.scale(forward()[-1]), self.awp, self._average)
            try:
                logits, targets, loss = forward()
                metrics = {"loss": loss.detach(), **method.metrics(logits, targets)}
                good = self._backward(loss, rates)
                self._average(self._shared())
                if self.gradient_norms:
                    metrics["gradient_norms"] = self._norms_of_gradients(loss)
            finally:
                restore()
            self._update(good, rates)
            self._drop_gradients()
            self._names, self._logits = list(metrics), logits.adversarial.detach()
            return *metrics.values(), *nan

        def keep() -> tuple[Any, ...]:
            return self._names, self._logits, None if attack is None else attack.memory()

        def check(owners: tuple[Any, ...]) -> None:
            self._names, logits, _ = owners
            checked_logits(logits, len(images), largest_label)

        inputs = (images.detach(), labels, start, *rates)
        self.reason = self._obstacle(images)
        with nullcontext() if attack is None else attack.in_turn():
            if self.reason:
                results = step(*inputs)
            else:
                if self._graphs is None or self._graphs.device != images.device:
                    self._graphs = cuda_graph.Graphs(images.device, "training step")
                results = self._graphs(self._key, step, inputs, keep, self._graphs.clear, check)
                self.reason = self._graphs.reason
        if attack is not None:
            attack.report(results[-1])
        return dict(zip(self._names, results, strict=False))

    def forget(self) -> None:
        """Drop all graphs and why there were none.

        Only needed if a forward reads globals or closures, whose changes go unnoticed, or to try again after an error.
        """
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None

    def _own_attack(self) -> PGD | None:
        """The attack, if its random start can be drawn by itself."""
        attack = self.attack
        known = type(attack) is PGD and attack.model is self.model and type(self.method).perturb is Method.perturb
        return attack if known else None

    def _drop_gradients(self) -> None:
        """Of all parameters: a graph must not add to memory that somebody else may free."""
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def _backward(self, loss: Tensor, rates: tuple[Tensor, ...]) -> Tensor:
        """The backward pass, unless the host knows that the loss is not finite; returns whether it is, []."""
        good = loss.detach().isfinite()
        if self.process_group is not None:
            good = all_true(good, self.process_group)
        if self.scaler.is_enabled():  # it skips the step for gradients that are not finite, as this makes them all
            loss = loss * (0 * loss.detach() + 1)  # 1, or NaN where the loss is not finite
        if rates or good:
            self.scaler.scale(loss).backward()
        return good

    def _parameters(self) -> list[nn.Parameter]:
        """Those of the optimiser."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _average(self, tensors: list[Tensor]) -> None:
        """Over all processes, in place."""
        if self.process_group is not None:
            average_(tensors, self.process_group)

    def _shared(self) -> list[Tensor]:
        """Gradients, none after a loss that was not finite, and running statistics."""
        if self.process_group is None:
            return []
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        return gradients + running_statistics(self.model)

    def _norms_of_gradients(self, loss: Tensor) -> Tensor:
        gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in self._parameters()]
        return torch.stack(torch._foreach_norm(gradients)) / self.scaler.scale(torch.ones_like(loss))

    def _update(self, good: Tensor, rates: tuple[Tensor, ...]) -> None:
        """The optimiser's step, unless the loss was not finite."""
        if not rates:  # the optimiser cannot decide on the device
            if good:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # as GradScaler tells it
        try:
            with _learning_rates(self.optimizer, rates):
                self.scaler.step(self.optimizer)
            self.scaler.update()
        finally:
            vars(self.optimizer).pop("found_inf", None)

    def _obstacle(self, images: Tensor) -> str:
        """Why a step on images like these cannot be captured; empty if it can, as far as is known."""
        if self.method.needs_source:
            return f"method {self.method.name!r} attacks a second batch"
        if self.process_group is not None:
            return "gradients come from several processes"
        if not has_graphs(images.device):
            return f"the images are on a {images.device.type}"
        if self.attack is not None and self._own_attack() is None:
            return f"the attack is a {type(self.attack).__name__}, not a PGD of this model for a usual method"
        if self.attack is not None and self.attack.looks_between_passes:
            return f"the attack's {self.attack.looks_between_passes}"
        if torch.is_autocast_enabled(images.device.type):
            return "it runs inside of autocast, which may hold old weights; use amp_dtype"
        try:
            if self._watch.look(self.model) or images.device not in self._model_obstacles:
                self._model_obstacles = {images.device: _obstacle_of_model(self.model, images.device)}
        except NotCaptured as error:
            return str(error)
        obstacle = _obstacle_of_optimizer(self.optimizer) or self._model_obstacles[images.device]
        return obstacle or _hooks_of_parameters(self.model)

    def _key(self) -> Hashable:
        """All that a step depends on besides values of tensors; the model has been looked at."""
        attack, scaler = self._own_attack(), self.scaler
        options = () if attack is None else tuple(v for k, v in vars(attack).items() if not k.startswith("_"))
        scaling = scaler.is_enabled() and (
            scaler.get_growth_factor(),
            scaler.get_backoff_factor(),
            scaler.get_growth_interval(),
        )
        trained = tuple(parameter.requires_grad for parameter in self.model.parameters())
        modes = tuple(module.training for module in modules_of(self.model))
        states = (self.optimizer.state.get(p, {}) for p in self._parameters())
        state = tuple(_plain(value) for entries in states for value in entries.values())
        groups = tuple(
            (*map(_plain, group["params"]), *((k, _plain(v)) for k, v in group.items() if k not in ("params", "lr")))
            for group in self.optimizer.param_groups
        )
        about = (self.method, self.amp_dtype, self.awp, self.label_smoothing, self.gradient_norms)
        return *about, options, scaling, self._watch.changes, trained, modes, state, groups


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that the batch norms of a network in train mode have just updated."""
    frozen = {layer.main_bn for layer in twin_layers(model)}
    norms = [m for m in modules_of(model) if isinstance(m, _BatchNorm) and m.training and m not in frozen]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


def _nothing() -> None:
    pass


def _hooks_of_parameters(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if any(getattr(parameter, hooks, None) for hooks in _TENSOR_HOOKS):
            return f"{name} has hooks"
    return ""


def _plain(value: Any) -> Hashable:
    return value.data_ptr() if isinstance(value, Tensor) else repr(value)


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimiser takes its learning rate, and whether to skip a step, from the device."""
    return type(optimizer) in (SGD, Adam, AdamW) and all(
        group.get("fused") and not group.get("dampening") for group in optimizer.param_groups
    )


def _rates(optimizer: Optimizer, device: torch.device) -> tuple[Tensor, ...]:
    """The learning rate of each group on the device, in the type that fused optimisers read; nothing waits."""
    if type(optimizer) is SGD:
        _make_momentum(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    return tuple(
        rate.detach().to(device, torch.float32).reshape(())
        if isinstance(rate, Tensor)
        else torch.full((), rate, dtype=torch.float32, device=device)
        for rate in rates
    )


def _make_momentum(optimizer: SGD) -> None:
    """Zeros, where there is none: if the first step is skipped, the fused SGD goes on with memory that nobody wrote."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@contextmanager
def _learning_rates(optimizer: Optimizer, rates: tuple[Tensor, ...]) -> Iterator[None]:
    """Tensors in place of the groups' learning rates inside the block."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def _obstacle_of_optimizer(optimizer: Optimizer) -> str:
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"the optimiser is a {type(optimizer).__name__}; SGD, Adam and AdamW can be captured"
    if not all(group["fused"] for group in optimizer.param_groups):
        return "the optimiser is not fused: give it fused=True"
    if not _skips_on_device(optimizer):
        return "the optimiser has dampening, whose first step cannot be skipped on the device"
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        return "the optimiser is not capturable: give it capturable=True"
    if any(getattr(optimizer, name, None) for name in _STEP_HOOKS):
        return "the optimiser has hooks"
    return ""


def _obstacle_of_model(model: nn.Module, device: torch.device) -> str:
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return f"{where} is a {type(module).__name__}"
        if is_compiled(module) or module._compiled_call_impl is not None:
            return f"{where} is compiled"
        if has_hooks(module):
            return f"{where} has hooks"
    if has_global_hooks():
        return "there are hooks on all modules"
    for name, tensor in tensors_of(model):
        if tensor.device != device:
            return f"{name} is on {tensor.device}"
    groups = [layer.process_group for layer in two_wing_layers(model) if layer.process_group is not None]
    if any(world_size(group) > 1 for group in groups):
        return "batch statistics come from several processes"
    return ""
