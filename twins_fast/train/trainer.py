"""The training loop; :class:`twins_fast.TrainingStep` shows the way of the images line by line."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from twins_fast.checkpoints import load_checkpoint, load_state, read_meta, save_checkpoint, write_atomically
from twins_fast.checkpoints.names import covered
from twins_fast.deferred import raise_found
from twins_fast.devices import autocast
from twins_fast.evaluation import Accuracy, evaluate
from twins_fast.methods import TrainingStep
from twins_fast.methods.training_step import running_statistics
from twins_fast.nn.wings import is_twin
from twins_fast.ops.group import ProcessLost, average_
from twins_fast.train.average import WeightAverage
from twins_fast.train.build import AMP_DTYPES, evaluation_attack, make_optimizer, mix, training_attack
from twins_fast.train.curves import draw_curves
from twins_fast.train.diagnosis import origin
from twins_fast.train.dynamics import Dynamics, robust_gap
from twins_fast.train.interruption import Interruption
from twins_fast.train.loaders import Loaders, from_step
from twins_fast.train.processes import ALONE, Processes
from twins_fast.train.progress import Progress
from twins_fast.train.recipe import Recipe
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.schedule import learning_rate
from twins_fast.train.seeds import derived_seed
from twins_fast.train.state import restore_state, save_state
from twins_fast.train.trackers import Trackers

SAVE_EVERY_SECONDS = 600.0
DRAW_EVERY_SECONDS = 20.0  # a picture takes one, which short epochs would wait for


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


class Trainer:
    """One run of a recipe.

    Args:
        recipe: hyper-parameters.
        folder: where everything is written; training resumes from its ``last`` checkpoint if there is one.
        model: a network that the recipe's method has prepared.
        loaders: of :func:`twins_fast.train.loaders.loaders`; the best network is chosen on the validation images, or
            on the test images if there are none.
        classes: class names, written into the checkpoints.
        device: where to train.
        processes: that train together, each with loaders for its part of the batches. Their networks, momenta and
            decisions are the same; the first one writes.

    The trajectory depends on the recipe alone: data order, augmentation, noise and learning rate are
    functions of the seed and the step, so a run that was killed at any moment and resumed repeats it.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        model: nn.Module,
        loaders: Loaders,
        classes: tuple[str, ...],
        device: torch.device | str,
        processes: Processes = ALONE,
    ):
        self.recipe = recipe
        self.folder = folder
        self.processes = processes
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.loaders = loaders
        self.classes = classes
        self.steps_per_epoch = len(loaders.train)
        self.total_steps = recipe.optimizer.epochs * self.steps_per_epoch
        self.step = 0
        self.evaluated = -1  # the step of the last evaluation
        self.best_robust = -1.0
        self.halvings = self.stale = 0  # of the learning rate; evaluations without a better network since the last one
        self.started = self.drawn = time.monotonic()
        self.optimizer = make_optimizer(recipe, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.run.amp == "fp16")
        self.training_step = TrainingStep(
            self.model,
            self.optimizer,
            method=recipe.method,
            attack=training_attack(recipe, self.model),
            amp_dtype=AMP_DTYPES[recipe.run.amp],
            scaler=self.scaler,
            awp=recipe.regularisation.awp,
            label_smoothing=recipe.regularisation.label_smoothing,
            gradient_norms=recipe.log.dynamics > 0,
            process_group=processes.group,
        )
        self.mix = mix(recipe, len(classes))
        self.evaluation_attack = evaluation_attack(recipe, self.model)
        ema = recipe.regularisation.ema
        self.average = WeightAverage(self.model, ema) if ema else None
        every = recipe.log.dynamics
        self.dynamics = Dynamics(self.model, self.optimizer, every) if every else None

    def fit(self) -> dict:
        """Train to the end and return the content of ``result.json``.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, once the step at hand and a checkpoint are complete.
            TrainingError: the loss is not finite, or another process has ended.
        """
        try:
            return self._fit()
        except ProcessLost as error:
            raise TrainingError(f"{error}; {self._kept()}") from None

    def _fit(self) -> dict:
        processes, first = self.processes, self.processes.is_first
        resumes = self.folder.last.exists()
        if resumes:
            self._restore()
        result = self.folder.read_result()
        processes.wait()  # all have read what the first one writes anew
        if self.dynamics is not None and first and not resumes:
            self.dynamics.keep_start(self.folder.start)
        if first:
            lines = self.folder.rewind_metrics(self.step, self.evaluated)
            # What the processes before this one spent counts, too.
            self.started = time.monotonic() - max((line.get("seconds", 0.0) for line in lines), default=0.0)
        if self.step == self.total_steps == self.evaluated and result.get("step") == self.step:
            return result
        reached = self.step if resumes else -1
        trackers = self.recipe.log.to if first else ()
        self.trackers = Trackers(trackers, self.folder.folder, self.recipe.to_dict(), reached)
        interruption = Interruption(processes.any if processes.count > 1 else None)
        with Progress(self.total_steps, self.step, shown=first) as progress, interruption, self.trackers:
            try:
                if not resumes:
                    self._warm_up()
                while True:
                    if self._evaluation_is_due():
                        self._evaluate_epoch(progress)
                        self._save_last()
                    if self.step >= self.total_steps:
                        break
                    self._train_epoch(progress, interruption)
                    self._save_last()
            except KeyboardInterrupt:
                if self.step and not interruption.broke_in:
                    self._save_last()
                raise
            return self._finish()

    def train_step(
        self, images: Tensor, labels: Tensor, source: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """One optimiser step on images [B, 3, H, W] in [0, 1] and labels [B]; returns the metrics."""
        recipe = self.recipe
        torch.manual_seed(self._seed("step", self.step))  # attack noise, dropout
        self.model.train()
        images, labels = self.mix(*self._on_device(images, labels))
        source = None if source is None else self._on_device(*source)
        rate = learning_rate(recipe.optimizer, self.step, self.steps_per_epoch, self.halvings)
        warm = self.step >= recipe.regularisation.awp_warmup * self.steps_per_epoch
        self.training_step.awp = recipe.regularisation.awp if warm else 0.0
        found = self.training_step(images, labels, rate, source)
        gradient_norms = found.pop("gradient_norms", None)
        own_loss = float(found["loss"])
        metrics = self.processes.mean({name: float(value) for name, value in found.items()})
        raise_found()  # the step has ended, and its checks with it
        if not abs(metrics["loss"]) < float("inf"):  # the step has changed no parameter
            where = f"at step {self.step}, learning rate {rate:g}: "
            finite = abs(own_loss) < float("inf")
            where += "in another process" if finite else origin(self.model, images)
            raise TrainingError(f"the loss is {metrics['loss']} {where}; {self._kept()}")
        self.step += 1
        if self.dynamics is not None:
            self.dynamics.look(gradient_norms)
        if self.average is not None:
            self.average.update(self.step)
        return {**metrics, "lr": rate}

    def _warm_up(self) -> None:
        """What comes before the first step; cut short, it is made again."""
        length = self.recipe.method.length_of_warmup(self.steps_per_epoch)
        for number, (images, labels) in zip(range(length), from_step(self.loaders.train, 0), strict=False):
            torch.manual_seed(self._seed("warm-up", number))
            self.model.train()
            self.recipe.method.warm_up(self.training_step.attack, self.model, *self._on_device(images, labels))
            if self.processes.group is not None:
                average_(running_statistics(self.model), self.processes.group)

    def _seed(self, purpose: str, number: int) -> int:
        """Of a step; other processes draw other numbers."""
        own = (self.processes.rank,) if self.processes.count > 1 else ()
        return derived_seed(purpose, self.recipe.run.seed, number, *own)

    def _kept(self) -> str:
        if not self.folder.last.exists():
            return "there is no checkpoint yet"
        step = read_meta(self.folder.last)["step"]
        return f"the last checkpoint is of step {step}, from which --resume {self.folder.folder} goes on"

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.recipe.network.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=layout, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def _train_epoch(self, progress: Progress, interruption: Interruption) -> None:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        batches = self.loaders.train.batch_sampler
        batches.epoch, batches.first = epoch, done
        source = repeat(None) if self.loaders.source is None else from_step(self.loaders.source, self.step)
        saved = time.monotonic()
        for (images, labels), of_source in zip(self.loaders.train, source, strict=False):
            with interruption.held():
                started = time.monotonic()
                metrics = self.train_step(images, labels, of_source)
                speed = len(labels) * self.processes.count / (time.monotonic() - started)
                self._log("train", images_per_second=round(speed, 1), **metrics)
                if self.dynamics is not None and self.processes.is_first and self.step % self.dynamics.every == 0:
                    self._log("dynamics", **self.dynamics.measure(metrics["lr"]))
                progress.step(speed, metrics)
                if time.monotonic() - saved > SAVE_EVERY_SECONDS and self.step % self.steps_per_epoch:
                    self._save_last()
                    saved = time.monotonic()

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        if rest or self.evaluated == self.step:
            return False
        options = self.recipe.evaluation
        return options.before if epoch == 0 else epoch % options.every == 0 or epoch == self.recipe.optimizer.epochs

    def _evaluate_epoch(self, progress: Progress) -> None:
        """Measure the network as it is, and keep it if it is the best one; before training, on the test images."""
        epoch = self.step // self.steps_per_epoch
        kind = "test" if epoch == 0 or self.loaders.validation is None else "validation"
        accuracy = self._evaluate(getattr(self.loaders, kind))
        gap = self._robust_gap(accuracy.robust) if self.processes.is_first else {}
        self._log(kind, **dataclasses.asdict(accuracy), **gap)
        progress.write(
            f"epoch {epoch}/{self.recipe.optimizer.epochs}: clean {accuracy.clean:.2%}, "
            f"under attack {accuracy.robust:.2%} on {accuracy.images} {kind} images"
        )
        better = epoch > 0 and accuracy.robust > self.best_robust
        if better and self.processes.is_first:
            meta = self._meta(epoch=epoch, chosen_on=kind, **dataclasses.asdict(accuracy))
            with self._averaged():
                state = self.model.state_dict()
                kept = {name: value for name, value in state.items() if not covered(name, self.recipe.method.dropped)}
                save_checkpoint(self.folder.best, kept, meta)
        stale = 0 if better or epoch == 0 else self.stale + 1
        halves = stale == self.recipe.optimizer.patience
        # Last: whatever stops this is made again.
        self.best_robust = accuracy.robust if better else self.best_robust
        self.stale, self.halvings = 0 if halves else stale, self.halvings + halves
        self.evaluated = self.step
        if time.monotonic() - self.drawn > DRAW_EVERY_SECONDS:
            self._draw()

    def _evaluate(self, batches: DataLoader, wing: str | None = None) -> Accuracy:
        with self._averaged(), autocast(AMP_DTYPES[self.recipe.run.amp], self.device):
            where = {"device": self.device, "process_group": self.processes.group}
            return evaluate(self.model, batches, self.evaluation_attack, wing=wing, **where)

    def _robust_gap(self, robust: float) -> dict[str, float]:
        """Of the epoch that has ended; nothing where training has no adversary."""
        if not getattr(self.training_step.attack, "steps", 0):
            return {}
        gap = robust_gap(self.folder.read_metrics(), self.step - self.steps_per_epoch, robust)
        return {} if gap is None else {"robust_gap": gap}

    def _averaged(self) -> AbstractContextManager:
        """Inside the block the model has the weights that are evaluated."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _finish(self) -> dict:
        self.processes.wait()  # the first one has written what all read now
        tests = {line["step"]: line for line in self.folder.read_metrics() if line["kind"] == "test"}

        def measured(wing: str | None = None) -> dict[str, float]:
            return dataclasses.asdict(self._evaluate(self.loaders.test, wing))

        def on_test(step: int) -> dict[str, float]:
            """The network of ``step``, which is the model's now; measured if it has not been."""
            accuracy = tests.get(step) or tests.setdefault(step, measured())
            return {name: accuracy[name] for name in ("clean", "robust", "images")}

        result = {
            "recipe": self.recipe.name,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "step": self.total_steps,
            "eval_steps": self.recipe.evaluation.steps,
            "after": on_test(self.total_steps),
        }
        if 0 in tests:
            result["before"] = on_test(0)
        if is_twin(self.model):
            result["after_frozen_wing"] = measured("frozen")
        if self.folder.best.exists():
            self.average = None  # it is in what is loaded
            state, meta = load_checkpoint(self.folder.best)
            load_state(self.model, state, allow_missing=self.recipe.method.dropped)
            best = {"epoch": meta["epoch"], "chosen_on": meta.get("chosen_on", "test")}
            result["best"] = best | on_test(meta["step"])
            result["robust_overfitting"] = result["best"]["robust"] - result["after"]["robust"]
        result |= {"seconds": round(time.monotonic() - self.started, 1), "threads": torch.get_num_threads()}
        if self.processes.count > 1:
            result["processes"] = self.processes.count
        if self.processes.is_first:
            write_atomically(self.folder.result, json.dumps(result, indent=2).encode())
        self._draw()
        return result

    def _draw(self) -> None:
        if not self.processes.is_first:
            return
        runs = {self.recipe.method.name: self.folder.read_metrics()}
        draw_curves(runs, self.folder.curves, self.recipe.name)
        self.drawn = time.monotonic()

    def _log(self, kind: str, **values: Any) -> None:
        if not self.processes.is_first:
            return
        seconds = round(time.monotonic() - self.started, 2)
        about = {"kind": kind, "step": self.step, "epoch": self.step / self.steps_per_epoch, "seconds": seconds}
        self.folder.log(**about, **values)
        self.trackers.log(about | values)

    def _meta(self, **more) -> dict:
        known = {"recipe": self.recipe.to_dict(), "classes": list(self.classes)}
        return known | {"images": len(self.loaders.train.dataset), "step": self.step, **more}

    def _save_last(self) -> None:
        if not self.processes.is_first:
            return
        self.trackers.flush()
        schedule = {"halvings": self.halvings, "stale": self.stale}
        meta = self._meta(evaluated=self.evaluated, best_robust=self.best_robust, **schedule)
        save_state(self.folder.last, self.model, self.optimizer, self.scaler, self.average, self.dynamics, meta)

    def _restore(self) -> None:
        meta = restore_state(self.folder.last, self.model, self.optimizer, self.scaler, self.average, self.dynamics)
        if self.dynamics is not None and self.folder.start.exists():
            self.dynamics.load_start(self.folder.start)
        for what, now in (("classes", list(self.classes)), ("images", len(self.loaders.train.dataset))):
            if meta.get(what, now) != now:
                before = meta[what]
                raise TrainingError(f"the data has changed since the run began: its {what} were {before}, now {now}")
        self.step, self.best_robust = meta["step"], meta["best_robust"]
        self.halvings, self.stale = meta.get("halvings", 0), meta.get("stale", 0)
        self.evaluated = meta.get("evaluated", self.step)  # version 0.1 saved only after it had evaluated
