"""How the embedded assets are made: ``twins-fast pretrain``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from twins_fast.checkpoints import load_checkpoint, save_checkpoint
from twins_fast.evaluation import evaluate
from twins_fast.models import build_model
from twins_fast.train import assets, data
from twins_fast.train.recipes import TARGET_CLASSES, Recipe
from twins_fast.train.run import Run
from twins_fast.train.trainer import eval_attack, run_recipe

STANDARD_EPOCHS = 5  # enough for the comparison: a standard network has no robustness at any length
TRAIN_IMAGES, TEST_IMAGES = 1000, 1000


def pretrain(recipe: Recipe, folder: Path, data_root: str | None, device: str, out: Path) -> dict:
    """Pre-train on the source classes, measure, and write all assets.

    Trains the robust network (``folder/at``) and, for comparison, a standard one
    (``folder/standard``), going on where an interrupted run stopped; measures both on all source
    test images; writes the robust network in float16 and a subset of the target images.

    Args:
        recipe: ``mini-pretrain``, perhaps with overrides.
        folder: of the two runs.
        data_root: the ``.npz`` file of CIFAR-10.
        device: where to train.
        out: folder of the assets.

    Returns:
        The record that is also kept in ``mini-source.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_target_images(recipe, data_root, out)
    robust, robust_result = _train(recipe, Run(folder / recipe.method), data_root, device)
    half = {name: value.half() if value.is_floating_point() else value for name, value in robust.items()}
    short = dataclasses.replace(recipe, method="standard", epochs=STANDARD_EPOCHS)
    standard, standard_result = _train(short, Run(folder / "standard"), data_root, device)
    record = {
        "command": "twins-fast pretrain --data-root cifar10.npz",
        "recipe": recipe.to_dict(),
        "torch": torch.__version__,
        "threads": robust_result["threads"],
        "robust": _measure(recipe, half, data_root, device) | _cost(recipe, robust_result),
        "standard": _measure(recipe, standard, data_root, device) | _cost(short, standard_result),
    }
    save_checkpoint(out / assets.NETWORK.name, half, record)
    return record


def write_target_images(recipe: Recipe, data_root: str | None, out: Path) -> None:
    """A balanced random subset of the target classes' training and test images."""
    target = dataclasses.replace(recipe, classes=TARGET_CLASSES)
    train, test, classes = data.load_datasets(target, data_root)
    generator = np.random.default_rng(recipe.seed)
    images, labels = [], []
    for part, count in ((train, TRAIN_IMAGES), (test, TEST_IMAGES)):
        order = generator.permutation(len(part))
        per_class = [order[part.labels[order] == k][: count // len(classes)] for k in range(len(classes))]
        chosen = generator.permutation(np.concatenate(per_class))
        images.append(part.images[chosen])
        labels.append(part.labels[chosen])
    assets.write_images(np.concatenate(images), np.concatenate(labels), classes, len(labels[0]), out)


def _train(recipe: Recipe, run: Run, data_root: str | None, device: str) -> tuple[dict[str, torch.Tensor], dict]:
    result = run_recipe(recipe, run, data_root, device, resume=True)
    tensors, _ = load_checkpoint(run.last)
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, result


def _measure(recipe: Recipe, state: dict[str, torch.Tensor], data_root: str | None, device: str) -> dict:
    """Clean and PGD-10 accuracy on every source test image."""
    train, test, classes = data.load_datasets(recipe, data_root)
    _, loader = data.loaders(dataclasses.replace(recipe, eval_images=0), train, test)
    model = build_model(recipe.arch, len(classes)).to(device)
    model.load_state_dict(state)
    return dataclasses.asdict(evaluate(model, loader, eval_attack(recipe, model), device=device))


def _cost(recipe: Recipe, result: dict) -> dict:
    return {"epochs": recipe.epochs, "attack_steps": recipe.steps, "minutes": round(result["seconds"] / 60, 1)}
