"""A recipe from its data to its result, with the baselines beside it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from twins_fast.checkpoints.names import layer_of
from twins_fast.nn import convert_sync_twin_bn
from twins_fast.nn.heads import HEAD
from twins_fast.nn.wings import two_wing_layers
from twins_fast.options import to_plain
from twins_fast.train.build import make_network
from twins_fast.train.curves import draw_curves
from twins_fast.train.datasets import load_datasets
from twins_fast.train.loaders import Loaders, loaders
from twins_fast.train.processes import ALONE, Processes
from twins_fast.train.recipe import Data, Evaluation, Recipe, RecipeError
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.state import weights
from twins_fast.train.trackers import check_trackers
from twins_fast.train.trainer import Trainer


def run_with_baselines(
    recipe: Recipe,
    folder: Path,
    data_root: str | None,
    device: torch.device | str,
    *,
    resume: bool,
    processes: Processes = ALONE,
) -> list[dict]:
    """Train a recipe into ``folder`` and its baselines into ``folder/METHOD``; their results, the recipe's own first.

    A baseline shares everything but the method, and keeps the method's options that both have. The picture in
    ``folder`` shows all of them. Arguments and errors are those of :func:`run_recipe`.
    """
    runs = [RunFolder(folder)]
    results = [run_recipe(recipe, runs[0], data_root, device, resume=resume, processes=processes)]
    for name in recipe.run.baselines:
        if name == recipe.method.name:
            continue
        runs.append(RunFolder(folder / name))
        baseline = recipe.replaced(method=name, run={"baselines": []}, evaluation={"before": False})
        if resume and runs[-1].exists():  # of an older version, perhaps, with an option that the main method lacks
            own, _ = runs[-1].load_config()
            baseline = own.replaced(optimizer={"epochs": recipe.optimizer.epochs}, log=to_plain(recipe.log))
        results.append(run_recipe(baseline, runs[-1], data_root, device, resume=resume, processes=processes))
    if len(runs) > 1 and processes.is_first:
        lines = {result["method"]: run.read_metrics() for result, run in zip(results, runs, strict=True)}
        draw_curves(lines, runs[0].curves, recipe.name)
    return results


def run_recipe(
    recipe: Recipe,
    folder: RunFolder,
    data_root: str | None,
    device: torch.device | str,
    *,
    resume: bool,
    processes: Processes = ALONE,
) -> dict:
    """Train a recipe into a run folder and return its result.

    The folder is made only once the data, the network and its checkpoint have been read.

    Args:
        recipe: all hyper-parameters.
        folder: where everything is written.
        data_root: see :func:`twins_fast.train.datasets.load_datasets`.
        device: where to train.
        resume: resume the run if the folder holds one (of this very recipe).
        processes: that train together, each by this function. The first one writes.

    Raises:
        RecipeError: a two-wing method without a checkpoint; shared statistics that this network cannot have.
        TrackerError: one that is asked for is not installed, or broken.
        DataError, CheckpointError, RunError, TrainingError: whatever is missing, broken or unwritable.
    """
    check_trackers(recipe.log.to)
    if resume and folder.exists():
        folder.check_recipe(recipe)
    resumes = resume and folder.last.exists()
    if not resume and recipe.network.checkpoint not in ("", "none", "embedded"):  # a resume may start elsewhere
        recipe = recipe.replaced(network={"checkpoint": os.path.abspath(recipe.network.checkpoint)})
    pretrained = recipe.method.wings > 1 or recipe.method.needs_pretrained
    if pretrained and not (recipe.network.checkpoint or resumes):
        raise RecipeError(
            f"method {recipe.method.name!r} fine-tunes a pre-trained network: say --checkpoint FILE, "
            "or --checkpoint none for random weights"
        )
    if recipe.method.needs_source and (recipe.network.checkpoint == "none" or not recipe.data.source):
        raise RecipeError(
            f"method {recipe.method.name!r} goes on with the pre-training: say --checkpoint FILE, and --data.source D "
            "for its images"
        )
    batches, classes = data_loaders(
        recipe.data,
        recipe.evaluation,
        data_root,
        recipe.run.seed,
        source=recipe.method.needs_source,
        processes=processes,
    )
    network = recipe.network
    if resumes and not recipe.method.needs_pretrained:  # anything else is in the run's last checkpoint
        network = recipe.replaced(network={"checkpoint": "none"}).network
    made = make_network(network, len(classes), recipe.run.seed, source_head=recipe.method.needs_source)
    model = recipe.method.prepare(made)
    if recipe.run.sync_statistics and processes.count > 1:
        model = _with_shared_statistics(model, device)
    processes.wait()  # all have seen the folder as it was
    with folder.locked() if processes.is_first else nullcontext():
        if processes.is_first:
            if resume and folder.exists():
                folder.update(recipe, data_root)
            else:
                folder.create(recipe, data_root)
            together = f", {processes.count} processes" if processes.count > 1 else ""
            print(
                f"{recipe.name}: {recipe.method.name} on {recipe.data.dataset} ({len(batches.train.dataset)} training "
                f"images, {len(classes)} classes), {recipe.network.arch}, {device}{together}, into {folder.folder}",
                flush=True,
            )
        if recipe.network.init_head == "adversarial-probe" and not resumes:
            model.load_state_dict(_probed_head(recipe, folder, data_root, device, processes), strict=False)
        return Trainer(recipe, folder, model, batches, classes, device, processes).fit()


def _with_shared_statistics(model: nn.Module, device: torch.device | str) -> nn.Module:
    if two_wing_layers(model):
        return convert_sync_twin_bn(model)
    if torch.device(device).type == "cpu":
        raise RecipeError("sync_statistics without two-wing layers is SyncBatchNorm, which PyTorch has on GPUs only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _probed_head(
    recipe: Recipe, folder: RunFolder, data_root: str | None, device: torch.device | str, processes: Processes
) -> dict[str, torch.Tensor]:
    """The entries of a head that a run of its own has trained alone, under attack, inside of the run's folder."""
    probe = recipe.replaced(
        method="adversarial-linear-probe",
        network={"init_head": "random"},
        optimizer={
            "epochs": recipe.network.probe_epochs,
            "lr": recipe.network.probe_lr,
            "schedule": "multistep",
            "milestones": (),
        },
        evaluation={"before": False},
        run={"baselines": ()},
    )
    inside = RunFolder(folder.folder / "head")
    run_recipe(probe, inside, data_root, device, resume=True, processes=processes)
    return {name: value for name, value in weights(inside.last).items() if layer_of(name).endswith(HEAD)}


def data_loaders(
    data: Data,
    evaluation: Evaluation,
    data_root: str | None,
    seed: int,
    source: bool = False,
    processes: Processes = ALONE,
) -> tuple[Loaders, tuple[str, ...]]:
    """The loaders of a recipe, with that of the images of the pre-training if ``source``, and the class names.

    Raises:
        DataError: no such data there, or not in the expected form.
    """
    train, test, classes = load_datasets(data.dataset, data_root, classes=data.classes, seed=seed)
    kind = "npz" if data.source.endswith(".npz") else "folder"
    made = loaders(
        train,
        test,
        source=load_datasets(kind, data.source, classes=data.source_classes)[0] if source else None,
        batch_size=data.batch_size,
        augmentation=data.augmentation,
        validation_part=evaluation.validation_part if evaluation.choose_on == "validation" else 0.0,
        evaluation_images=evaluation.images,
        seed=seed,
        workers=min(len(os.sched_getaffinity(0)), 4) if data.workers is None else data.workers,
        processes=processes,
    )
    return made, classes
