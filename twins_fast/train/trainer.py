"""The training loop; ``Trainer.train_step`` shows the way of the images line by line."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from twins_fast.attacks import PGD
from twins_fast.checkpoints import (
    load_checkpoint,
    load_pretrained,
    load_state,
    read_state_dict,
    save_checkpoint,
    write_atomically,
)
from twins_fast.evaluation import Accuracy, evaluate
from twins_fast.methods import METHODS, Method
from twins_fast.models import build_model
from twins_fast.nn.wings import is_twin
from twins_fast.options import known
from twins_fast.train import assets, data
from twins_fast.train.plots import draw_curves
from twins_fast.train.recipes import Recipe
from twins_fast.train.run import Run

SAVE_EVERY_SECONDS = 600.0
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


def method_of(recipe: Recipe) -> Method:
    """The recipe's method with its options."""
    options = {"frozen_weight": recipe.twins_lambda, "beta": recipe.trades_beta, "adversary": recipe.adversary}
    return known(METHODS[recipe.method], **options)


def make_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network: pre-trained body, fresh head, two-wing layers where the method has wings."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.arch, num_classes, recipe.upsample)
    if recipe.checkpoint is not None:
        path = assets.NETWORK if recipe.checkpoint == "embedded" else recipe.checkpoint
        load_pretrained(model, read_state_dict(path))
    model = method_of(recipe).prepare(model)
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0: a pure function, so that a resumed run needs no state.

    ``multistep`` multiplies by ``lr_gamma`` at each milestone; ``onecycle`` rises linearly to ``lr``
    over the first ``warmup`` of the run and falls linearly to zero.
    """
    if recipe.schedule == "multistep":
        return recipe.lr * recipe.lr_gamma ** sum(step >= m * steps_per_epoch for m in recipe.milestones)
    progress = (step + 0.5) / (recipe.epochs * steps_per_epoch)
    return recipe.lr * min(progress / recipe.warmup, (1 - progress) / (1 - recipe.warmup))


def autocast(recipe: Recipe, device: torch.device | str):
    """The context a recipe's network runs in."""
    dtype = _AMP_DTYPES.get(recipe.amp)
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


class Trainer:
    """One run of a recipe.

    Args:
        recipe: hyper-parameters.
        run: where everything is written; its ``last`` checkpoint, if there is one, is gone on from.
        model: what :func:`make_network` returns.
        train, test: loaders of :func:`twins_fast.train.data.loaders`.
        classes: class names, written into the checkpoints.
        device: where to train.

    The trajectory depends on the recipe alone: data order, augmentation, noise and learning rate are
    functions of the seed and the step, so a run that was killed at any moment and resumed repeats it.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        model: nn.Module,
        train: DataLoader,
        test: DataLoader,
        classes: tuple[str, ...],
        device: torch.device | str,
    ):
        self.recipe = recipe
        self.run = run
        self.device = torch.device(device)
        self.method = method_of(recipe)
        self.model = model.to(self.device)
        self.train_loader = train
        self.test_loader = test
        self.classes = classes
        self.steps_per_epoch = len(train)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.best_robust = -1.0
        self.seconds = 0.0  # spent by the processes that this one goes on from
        self.started = time.monotonic()
        self.optimizer = torch.optim.SGD(
            self.method.parameters(self.model), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.attack = self.method.attack(
            self.model,
            eps=recipe.eps,
            alpha=recipe.alpha,
            steps=recipe.steps,
            norm=recipe.norm,
            engine=recipe.engine,
        )
        self.test_attack = eval_attack(recipe, self.model)

    def fit(self) -> dict:
        """Train to the end and return the content of ``result.json``."""
        if self.run.last.exists():
            self._restore()
        self.run.rewind_metrics(self.step if self.step else -1)  # what precedes step 0 is measured again too
        self.started = time.monotonic() - self.seconds
        if self.recipe.eval_before and self.step == 0:
            self._test(epoch=0)
        with tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.total_steps:
                self._train_epoch(bar)
                epoch = self.step // self.steps_per_epoch
                if epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs:
                    accuracy = self._test(epoch)
                    bar.write(
                        f"epoch {epoch}/{self.recipe.epochs}: clean {accuracy.clean:.2%}, "
                        f"under attack {accuracy.robust:.2%} on {accuracy.images} images"
                    )
                    if accuracy.robust > self.best_robust:
                        self.best_robust = accuracy.robust
                        self._save_best(epoch, accuracy)
                self._save_last()
        return self._finish()

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimiser step on images [B, 3, H, W] in [0, 1] and labels [B]; returns the metrics."""
        recipe = self.recipe
        torch.manual_seed(data.derived_seed(recipe.seed, self.step))  # attack noise, dropout
        self.model.train()
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        rate = learning_rate(recipe, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        method, model = self.method, self.model
        with autocast(recipe, self.device):
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
            self.run.log(kind="train", step=self.step, epoch=epoch, images_per_second=round(speed, 1), **metrics)
            shown = {"loss": f"{metrics['loss']:.3f}", "images/s": f"{speed:.0f}"}
            shown |= {k.removesuffix("_accuracy"): f"{v:.0%}" for k, v in metrics.items() if k.endswith("_accuracy")}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if time.monotonic() - saved > SAVE_EVERY_SECONDS and self.step % self.steps_per_epoch:
                self._save_last()
                saved = time.monotonic()

    def _test(self, epoch: int) -> Accuracy:
        accuracy = self._evaluate(None)
        self.run.log(kind="test", step=self.step, epoch=epoch, **dataclasses.asdict(accuracy))
        return accuracy

    def _evaluate(self, wing: str | None) -> Accuracy:
        with autocast(self.recipe, self.device):
            return evaluate(self.model, self.test_loader, self.test_attack, device=self.device, wing=wing)

    def _meta(self, **more) -> dict:
        return {"recipe": self.recipe.to_dict(), "classes": list(self.classes), "step": self.step, **more}

    def _save_best(self, epoch: int, accuracy: Accuracy) -> None:
        save_checkpoint(self.run.best, self.model.state_dict(), self._meta(epoch=epoch, **dataclasses.asdict(accuracy)))

    def _save_last(self) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        meta = self._meta(
            best_robust=self.best_robust,
            scaler=self.scaler.state_dict(),
            seconds=time.monotonic() - self.started,
        )
        save_checkpoint(self.run.last, tensors, meta)

    def _restore(self) -> None:
        tensors, meta = load_checkpoint(self.run.last)
        part = {
            kind: {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in ("model.", "momentum.")
        }
        load_state(self.model, part["model."])
        for name, parameter in self.model.named_parameters():
            if name in part["momentum."]:
                buffer = torch.empty_like(parameter).copy_(part["momentum."][name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
        self.scaler.load_state_dict(meta["scaler"])
        self.step = meta["step"]
        self.best_robust = meta["best_robust"]
        self.seconds = meta["seconds"]

    def _finish(self) -> dict:
        if not any(line["kind"] == "test" for line in self.run.read_metrics()):  # the file was lost
            self._test(self.recipe.epochs)
        lines = self.run.read_metrics()
        tests = [line for line in lines if line["kind"] == "test"]
        result = {
            "recipe": self.recipe.name,
            "method": self.recipe.method,
            "seed": self.recipe.seed,
            "test_images": tests[-1]["images"],
            "after": {k: tests[-1][k] for k in ("clean", "robust")},
            "eval_steps": self.recipe.eval_steps,
            "seconds": round(time.monotonic() - self.started, 1),
            "threads": torch.get_num_threads(),
        }
        if tests[0]["epoch"] == 0:
            result["before"] = {k: tests[0][k] for k in ("clean", "robust")}
        if is_twin(self.model):
            frozen = self._evaluate("frozen")
            result["after_frozen_wing"] = {"clean": frozen.clean, "robust": frozen.robust}
        write_atomically(self.run.result, json.dumps(result, indent=2).encode())
        draw_curves(lines, self.run.curves, f"{self.recipe.name}, {self.recipe.method}")
        return result


def run_recipe(recipe: Recipe, run: Run, data_root: str | None, device: torch.device | str, *, resume: bool) -> dict:
    """Train a recipe into a run folder and return its result.

    The folder is made only once the data, the network and its checkpoint have been read.

    Args:
        resume: go on with the run if the folder holds one (of this very recipe).

    Raises:
        DataError, CheckpointError, RunError, TrainingError: whatever is missing, broken or unwritable.
    """
    train, test, classes = data.load_datasets(recipe, data_root)
    train_loader, test_loader = data.loaders(recipe, train, test)
    whole = resume and run.last.exists()  # then the pre-trained file is no longer needed
    model = make_network(dataclasses.replace(recipe, checkpoint=None) if whole else recipe, len(classes))
    if resume and run.exists():
        run.check_recipe(recipe)
    else:
        run.create(recipe, data_root)
    print(
        f"{recipe.name}: {recipe.method} on {recipe.dataset} ({len(train)} training images, "
        f"{len(classes)} classes), {recipe.arch}, {device}, into {run.folder}",
        flush=True,
    )
    return Trainer(recipe, run, model, train_loader, test_loader, classes, device).fit()


def eval_attack(recipe: Recipe, model: nn.Module) -> PGD:
    """The attack of the published evaluation: no random start."""
    return PGD(
        model,
        eps=recipe.eps,
        alpha=recipe.eval_alpha,
        steps=recipe.eval_steps,
        norm=recipe.norm,
        random_start=False,
        engine=recipe.engine,
    )
