"""The training loop; ``Trainer.train_step`` shows the way of the images line by line."""

from __future__ import annotations

import dataclasses
import json
import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from twins_fast.checkpoints import save_checkpoint, write_atomically
from twins_fast.evaluation import Accuracy, evaluate
from twins_fast.nn.wings import is_twin
from twins_fast.train.build import autocast, evaluation_attack, make_optimizer, training_attack
from twins_fast.train.plots import draw_curves
from twins_fast.train.recipe import Recipe
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.schedule import learning_rate
from twins_fast.train.seeds import derived_seed
from twins_fast.train.state import restore_state, save_state

SAVE_EVERY_SECONDS = 600.0


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


class Trainer:
    """One run of a recipe.

    Args:
        recipe: hyper-parameters.
        folder: where everything is written; training resumes from its ``last`` checkpoint if there is one.
        model: a network that the recipe's method has prepared.
        train, test: loaders of :func:`twins_fast.train.loaders.loaders`.
        classes: class names, written into the checkpoints.
        device: where to train.

    The trajectory depends on the recipe alone: data order, augmentation, noise and learning rate are
    functions of the seed and the step, so a run that was killed at any moment and resumed repeats it.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        model: nn.Module,
        train: DataLoader,
        test: DataLoader,
        classes: tuple[str, ...],
        device: torch.device | str,
    ):
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.train_loader = train
        self.test_loader = test
        self.classes = classes
        self.steps_per_epoch = len(train)
        self.total_steps = recipe.optimizer.epochs * self.steps_per_epoch
        self.step = 0
        self.best_robust = -1.0
        self.seconds = 0.0  # spent by the processes before this one
        self.started = time.monotonic()
        self.optimizer = make_optimizer(recipe, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.run.amp == "fp16")
        self.attack = training_attack(recipe, self.model)
        self.test_attack = evaluation_attack(recipe, self.model)

    def fit(self) -> dict:
        """Train to the end and return the content of ``result.json``."""
        if self.folder.last.exists():
            self._restore()
        self.folder.rewind_metrics(self.step if self.step else -1)  # what precedes step 0 is measured again too
        self.started = time.monotonic() - self.seconds
        epochs, evaluation = self.recipe.optimizer.epochs, self.recipe.evaluation
        if evaluation.before and self.step == 0:
            self._test(epoch=0)
        with tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.total_steps:
                self._train_epoch(bar)
                epoch = self.step // self.steps_per_epoch
                if epoch % evaluation.every == 0 or epoch == epochs:
                    accuracy = self._test(epoch)
                    bar.write(
                        f"epoch {epoch}/{epochs}: clean {accuracy.clean:.2%}, "
                        f"under attack {accuracy.robust:.2%} on {accuracy.images} images"
                    )
                    if accuracy.robust > self.best_robust:
                        self.best_robust = accuracy.robust
                        self._save_best(epoch, accuracy)
                self._save_last()
        return self._finish()

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimiser step on images [B, 3, H, W] in [0, 1] and labels [B]; returns the metrics."""
        recipe, method, model = self.recipe, self.recipe.method, self.model
        torch.manual_seed(derived_seed(recipe.run.seed, self.step))  # attack noise, dropout
        model.train()
        layout = torch.channels_last if recipe.network.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        rate = learning_rate(recipe.optimizer, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(recipe.run.amp, self.device):
            largest_label = method.check(model, images, labels)
            adversarial = method.perturb(self.attack, model, images, labels, largest_label)
            logits = method.forward(model, images, adversarial, largest_label)  # of [frozen | adaptive] rows
            loss = method.loss(logits, labels)
        metrics = {"loss": float(loss.detach())}
        metrics |= {name: float(value) for name, value in method.metrics(logits, labels).items()}
        if not abs(metrics["loss"]) < float("inf"):
            raise TrainingError(f"the loss is {metrics['loss']} at step {self.step}, learning rate {rate:g}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return {**metrics, "lr": rate}

    def _train_epoch(self, bar: tqdm) -> None:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        batches = self.train_loader.batch_sampler
        batches.epoch, batches.first = epoch, done
        saved = time.monotonic()
        for images, labels in self.train_loader:
            started = time.monotonic()
            metrics = self.train_step(images, labels)
            speed = len(labels) / (time.monotonic() - started)
            self.folder.log(kind="train", step=self.step, epoch=epoch, images_per_second=round(speed, 1), **metrics)
            shown = {"loss": f"{metrics['loss']:.3f}", "images/s": f"{speed:.0f}"}
            shown |= {k.removesuffix("_accuracy"): f"{v:.0%}" for k, v in metrics.items() if k.endswith("_accuracy")}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if time.monotonic() - saved > SAVE_EVERY_SECONDS and self.step % self.steps_per_epoch:
                self._save_last()
                saved = time.monotonic()

    def _test(self, epoch: int) -> Accuracy:
        accuracy = self._evaluate(None)
        self.folder.log(kind="test", step=self.step, epoch=epoch, **dataclasses.asdict(accuracy))
        return accuracy

    def _evaluate(self, wing: str | None) -> Accuracy:
        with autocast(self.recipe.run.amp, self.device):
            return evaluate(self.model, self.test_loader, self.test_attack, device=self.device, wing=wing)

    def _meta(self, **more) -> dict:
        return {"recipe": self.recipe.to_dict(), "classes": list(self.classes), "step": self.step, **more}

    def _save_best(self, epoch: int, accuracy: Accuracy) -> None:
        meta = self._meta(epoch=epoch, **dataclasses.asdict(accuracy))
        save_checkpoint(self.folder.best, self.model.state_dict(), meta)

    def _save_last(self) -> None:
        meta = self._meta(best_robust=self.best_robust, seconds=time.monotonic() - self.started)
        save_state(self.folder.last, self.model, self.optimizer, self.scaler, meta)

    def _restore(self) -> None:
        meta = restore_state(self.folder.last, self.model, self.optimizer, self.scaler)
        self.step, self.best_robust, self.seconds = meta["step"], meta["best_robust"], meta["seconds"]

    def _finish(self) -> dict:
        if not any(line["kind"] == "test" for line in self.folder.read_metrics()):  # the file was lost
            self._test(self.recipe.optimizer.epochs)
        lines = self.folder.read_metrics()
        tests = [line for line in lines if line["kind"] == "test"]
        result = {
            "recipe": self.recipe.name,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "test_images": tests[-1]["images"],
            "after": {k: tests[-1][k] for k in ("clean", "robust")},
            "eval_steps": self.recipe.evaluation.steps,
            "seconds": round(time.monotonic() - self.started, 1),
            "threads": torch.get_num_threads(),
        }
        if tests[0]["epoch"] == 0:
            result["before"] = {k: tests[0][k] for k in ("clean", "robust")}
        if is_twin(self.model):
            frozen = self._evaluate("frozen")
            result["after_frozen_wing"] = {"clean": frozen.clean, "robust": frozen.robust}
        write_atomically(self.folder.result, json.dumps(result, indent=2).encode())
        draw_curves(lines, self.folder.curves, f"{self.recipe.name}, {self.recipe.method.name}")
        return result
