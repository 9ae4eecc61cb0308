"""How the embedded assets are made: ``twins-fast pretrain``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from twins_fast.checkpoints import save_checkpoint
from twins_fast.evaluation import evaluate
from twins_fast.train import assets
from twins_fast.train.build import evaluation_attack, make_network
from twins_fast.train.datasets import load_datasets
from twins_fast.train.recipe import Recipe
from twins_fast.train.recipes import TARGET_CLASSES
from twins_fast.train.run import data_loaders, run_recipe
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.state import weights

STANDARD_EPOCHS = 5  # enough for the comparison: a standard network has no robustness at any length
TRAIN_IMAGES, TEST_IMAGES = 2500, 1000


def pretrain(recipe: Recipe, folder: Path, data_root: str | None, device: str, out: Path, command: str) -> dict:
    """Pre-train on the source classes, measure, and write all assets.

    Trains the robust network (``folder/at``) and, for comparison, a standard one
    (``folder/standard``), resuming interrupted runs; measures both on all source
    test images; writes the robust network in float16 and a subset of the target images.

    Args:
        recipe: ``mini-pretrain``, perhaps with overrides.
        folder: of the two runs.
        data_root: the ``.npz`` file of CIFAR-10.
        device: where to train.
        out: folder of the assets.
        command: how this was asked for, for the record.

    Returns:
        The record that is also kept in ``mini-source.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_target_images(recipe, data_root, out)
    robust, robust_result = _train(recipe, RunFolder(folder / recipe.method.name), data_root, device)
    half = {name: value.half() if value.is_floating_point() else value for name, value in robust.items()}
    short = recipe.replaced(method="standard", optimizer={"epochs": STANDARD_EPOCHS})
    standard, standard_result = _train(short, RunFolder(folder / "standard"), data_root, device)
    record = {
        "command": command,
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
    train, test, classes = load_datasets(recipe.data.dataset, data_root, classes=TARGET_CLASSES)
    generator = np.random.default_rng(recipe.run.seed)
    images, labels = [], []
    for part, count in ((train, TRAIN_IMAGES), (test, TEST_IMAGES)):
        order = generator.permutation(len(part))
        per_class = [order[part.labels[order] == k][: count // len(classes)] for k in range(len(classes))]
        chosen = generator.permutation(np.concatenate(per_class))
        images.append(part.images[chosen])
        labels.append(part.labels[chosen])
    assets.write_images(np.concatenate(images), np.concatenate(labels), classes, len(labels[0]), out)


def _train(
    recipe: Recipe, folder: RunFolder, data_root: str | None, device: str
) -> tuple[dict[str, torch.Tensor], dict]:
    result = run_recipe(recipe, folder, data_root, device, resume=True)
    return weights(folder.last), result


def _measure(recipe: Recipe, state: dict[str, torch.Tensor], data_root: str | None, device: str) -> dict:
    """Clean and PGD-10 accuracy on every source test image."""
    whole = dataclasses.replace(recipe.evaluation, images=0)
    batches, classes = data_loaders(recipe.data, whole, data_root, recipe.run.seed)
    model = make_network(recipe.network, len(classes)).to(device)
    model.load_state_dict(state)
    return dataclasses.asdict(evaluate(model, batches.test, evaluation_attack(recipe, model), device=device))


def _cost(recipe: Recipe, result: dict) -> dict:
    cost = {"epochs": recipe.optimizer.epochs, "minutes": round(result["seconds"] / 60, 1)}
    return cost if recipe.method.name == "standard" else cost | {"attack_steps": recipe.attack.steps}
