"""The commands: each a dataclass of its arguments that is called to run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal

import torch
from torch import nn
from tyro.conf import Positional, arg

from twins_fast.attacks.pgd import NORMS
from twins_fast.checkpoints import (
    WINGS,
    CheckpointError,
    convert_checkpoint,
    load_state,
    read_meta,
    read_state_dict,
    write_atomically,
)
from twins_fast.evaluation import Record, Results, robust_accuracy, transfer
from twins_fast.evaluation.named import attacks_named
from twins_fast.methods import METHODS
from twins_fast.models import ARCHITECTURES
from twins_fast.nn import convert_twin_bn, wings
from twins_fast.nn.wings import is_twin
from twins_fast.qualify import qualify
from twins_fast.train import assets
from twins_fast.train.build import AMP_DTYPES, make_network
from twins_fast.train.comparison import compared, comparison_csv, comparison_table
from twins_fast.train.config_file import read_recipe, recipe_as_toml
from twins_fast.train.curves import draw_runs
from twins_fast.train.datasets import DataError
from twins_fast.train.field_types import Integers, Names, OptionalPixels, SeveralPixels
from twins_fast.train.info import print_info
from twins_fast.train.interruption import Interruption
from twins_fast.train.pictures import FORMATS
from twins_fast.train.plots import draw_changes, draw_robustness
from twins_fast.train.pretrain import pretrain
from twins_fast.train.processes import ALONE, Processes, joined
from twins_fast.train.progress import Progress
from twins_fast.train.recipe import AMP, M, Recipe, RecipeError
from twins_fast.train.recipes import RECIPES, get_recipe
from twins_fast.train.run import data_loaders, run_with_baselines
from twins_fast.train.run_folder import RunError, RunFolder, labelled
from twins_fast.train.settings import axis_of, settings_of
from twins_fast.train.sweep import members_of, run_sweep
from twins_fast.train.sweep_results import chosen, rows_of, test_table, validation_table
from twins_fast.train.tables import result_table


def _own(metavar: str):
    """Annotation: an argument of the command itself, which need not be given."""
    return arg(metavar=metavar, help_behavior_hint="")


def _choice(names: Sequence[str]):
    return _own("{" + ",".join(names) + "}")


_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Train(Generic[M]):
    fields: Annotated[Recipe[M], arg(name="")]  # its sections stand beside the command's own arguments
    recipe: Annotated[str | None, _choice(RECIPES)] = None
    """Recipe to start from."""
    config: Annotated[str | None, _own("FILE")] = None
    """A recipe of your own in TOML, as twins-fast recipes NAME prints one."""
    method: Annotated[str | None, _choice(METHODS)] = None
    """Instead of the recipe's method."""
    run: Annotated[str | None, _own("RUN")] = None
    """Folder to write (default: runs/RECIPE-METHOD-TIME)."""
    resume: Annotated[str | None, _own("RUN")] = None
    """Resume an interrupted run, or extend a finished one with more --epochs."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""
    qualify: bool = True
    """First find out whether our kernels are right and faster on a GPU that has no verdict yet."""

    def __call__(self) -> None:
        _check_device(self.device)
        if self.resume and self.run:
            raise RecipeError("--run and --resume exclude each other")
        recipe, data_root, folder = self.fields, self.data_root, self.run or self.resume
        if self.resume:
            _, own_root = RunFolder(self.resume).load_config()
            data_root = data_root or own_root
        elif not (self.recipe or self.config):
            raise RecipeError(f"--recipe or --config is needed; choose from {', '.join(RECIPES)}")
        with joined(self.device) as processes:
            _qualify_first(self.device, self.qualify, processes)
            named = f"runs/{recipe.name}-{recipe.method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder = Path(processes.of_first(folder or named))
            resume = bool(self.resume)
            try:
                results = run_with_baselines(recipe, folder, data_root, self.device, resume=resume, processes=processes)
            except KeyboardInterrupt:
                if RunFolder(folder).exists():
                    raise KeyboardInterrupt(f"twins-fast train --resume {folder} resumes") from None
                raise
        if processes.is_first:
            print(result_table(results))
            print(f"\nwritten to {folder}")


@dataclass(frozen=True)
class Sweep(Generic[M]):
    fields: Annotated[Recipe[M], arg(name="")]
    axes: Annotated[Positional[tuple[str, ...]], _own("[FIELD=A,B,...]...")] = ()
    """What is varied: values, or with --draws a range, FIELD=log-uniform(LOW,HIGH) or FIELD=uniform(LOW,HIGH)."""
    folder: Annotated[str | None, _own("D")] = None
    """Folder of all runs (default: runs/sweep-RECIPE). The same command goes on there, also on several machines."""
    recipe: Annotated[str | None, _choice(RECIPES)] = None
    """Recipe to start from."""
    config: Annotated[str | None, _own("FILE")] = None
    """A recipe of your own in TOML."""
    method: Annotated[str | None, _choice(METHODS)] = None
    """Instead of the recipe's method."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set."""
    seeds: Annotated[Integers, _own("I,J,...")] = (0,)
    """Seeds with which each setting is trained."""
    chosen_seeds: Annotated[Integers, _own("I,J,...")] = ()
    """Seeds with which the chosen settings are trained, one of each method (default: the same)."""
    draws: Annotated[int, _own("N")] = 0
    """Settings that are drawn at random, by --seed; 0 for the grid of all values."""
    by: Annotated[Literal["robust", "clean"], _own("{robust,clean}")] = "robust"
    """Accuracy on validation images by which a setting is chosen."""
    attacks: Annotated[Names, _own("A,B,...")] = ()
    """Attacks, such as clean,autoattack, that the best networks of the chosen settings are measured by afterwards."""
    n: Annotated[int | None, arg(aliases=("--images",), metavar="N", help_behavior_hint="")] = None
    """Test images for these attacks, chosen by the seed; 0 for all."""
    devices: Annotated[Names, _own("D,E,...")] = (_DEVICE,)
    """Where to compute, one run at a time on each; cpu,cpu is two at a time."""
    qualify: bool = True
    """First find out whether our kernels are right and faster on a GPU that has no verdict yet."""

    def __call__(self) -> None:
        if not (self.recipe or self.config):
            raise RecipeError(f"--recipe or --config is needed; choose from {', '.join(RECIPES)}")
        if not (self.seeds and self.devices):
            raise RecipeError("--seeds and --devices name one each, at least")
        for device in self.devices:
            _check_device(device)
        if self.attacks:
            attacks_named(self.attacks)
        recipe, folder = self.fields, Path(self.folder or f"runs/sweep-{self.fields.name}")
        settings = settings_of(recipe, [axis_of(text) for text in self.axes], self.draws, recipe.run.seed)
        for device in dict.fromkeys(self.devices):
            _qualify_first(device, self.qualify)
        members = members_of(recipe, settings, self.seeds, folder)
        try:
            failures = run_sweep(members, self.data_root, self.devices)
            rows = rows_of(members)
            taken = chosen(rows, self.by)
            members = members_of(recipe, [row["setting"] for row in taken], self.chosen_seeds or self.seeds, folder)
            failures |= run_sweep(members, self.data_root, self.devices, self.attacks, self.n)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on") from None
        measured = rows_of(members)
        tables = f"{validation_table(rows, taken)}\n\nThe chosen settings:\n\n{test_table(measured)}\n"
        record = {"recipe": recipe.to_dict(), "axes": self.axes, "draws": self.draws, "by": self.by}
        record |= {"settings": rows, "chosen": measured, "failures": failures}
        write_atomically(folder / "sweep.json", (json.dumps(record, indent=2) + "\n").encode())
        write_atomically(folder / "sweep.md", tables.encode())
        print(f"\n{tables}\nwritten to {folder}")
        if failures:
            said = "; ".join(f"{label}: {why}" for label, why in failures.items())
            raise RunError(f"of {len(failures)} runs there is no result, and the same command tries them again: {said}")


@dataclass(frozen=True)
class Eval:
    source: Annotated[Positional[str], arg(metavar="RUN|FILE|embedded")]
    """A run folder (its best network), a checkpoint, or the network that comes with the package."""
    recipe: Annotated[str | None, _choice(RECIPES)] = None
    """Needed for a checkpoint that no run wrote, unless there is a --config."""
    config: Annotated[str | None, _own("FILE")] = None
    """A recipe in TOML."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set (default: where the run found it)."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""
    qualify: bool = True
    """First find out whether our kernels are right and faster on a GPU that has no verdict yet."""
    attacks: Annotated[Names, _own("A,B,...")] = ()
    """Attacks, such as clean,pgd100,apgd,autoattack (default: clean and PGD as in the run); docs/evaluation.md."""
    eps: Annotated[SeveralPixels, _own("N/255,...")] = ()
    """Radius of the ball, or several."""
    n: Annotated[int | None, arg(aliases=("--images",), metavar="N", help_behavior_hint="")] = None
    """Test images, chosen by the seed; 0 for all."""
    norm: Annotated[str | None, _choice(NORMS)] = None
    """Norm of the ball around the clean images."""
    alpha: Annotated[OptionalPixels, _own("N/255")] = None
    """Length of a step of PGD."""
    steps: Annotated[int | None, _own("N")] = None
    """Steps of PGD, where no attacks are named."""
    transfer: Annotated[str | None, _own("FILE")] = None
    """Also attack this other network, and see what that does to the one that is measured."""
    wing: Annotated[Literal["adaptive", "frozen"] | None, _own("{adaptive,frozen}")] = None
    """Wing of a two-wing network that is evaluated (default: adaptive)."""
    arch: Annotated[str | None, _choice(ARCHITECTURES)] = None
    """Name of the network."""
    batch_size: Annotated[int | None, _own("N")] = None
    """Images of a batch."""
    workers: Annotated[int | None, _own("N")] = None
    """Processes that load images; 0 for the process itself."""
    amp: Annotated[str | None, _choice(AMP)] = None
    """Half-precision dtype of the attacks; float32 judges them."""
    per_class: bool = False
    """Also print a table of the classes."""
    alarms: bool = True
    """Look for signs that the figures are wrong, which takes a few passes of 32 images."""
    again: bool = False
    """Measure what is known from an earlier evaluation once more."""
    json: Annotated[str | None, _own("FILE")] = None
    """Also write the figures into this file."""
    csv: Annotated[str | None, _own("FILE")] = None
    """Also write the figures, those of the classes too, as a table for other programs."""
    picture: Annotated[str | None, _own("FILE.png")] = None
    """Also draw accuracy over eps."""
    save_images: Annotated[str | None, _own("FILE.npz")] = None
    """Also write the adversarial images and, as FILE-changes.png, draw what the strongest attack changed most."""

    def __call__(self) -> None:
        _check_device(self.device)
        if self.attacks and self.steps is not None:
            raise RecipeError("--steps is of the attack that runs without --attacks; write pgd50 there")
        with joined(self.device) as processes:
            _qualify_first(self.device, self.qualify, processes)
            self._measure(processes)

    def _measure(self, processes: Processes) -> None:
        """Every process measures batches of its own; the first one then finds all of them in the record."""
        path = self._checkpoint()
        state, meta = read_state_dict(path), _meta(path)
        own = Recipe.from_dict(meta["recipe"]) if "recipe" in meta else None
        recipe, data_root = self._recipe(path, own), self.data_root
        run = RunFolder(path.parent)
        if data_root is None and own and run.exists():
            _, data_root = run.load_config()
        batches, classes = data_loaders(recipe.data, recipe.evaluation, data_root, recipe.run.seed)
        trained_on = tuple(meta.get("classes", own.data.classes if own else ()))
        if trained_on and trained_on != classes:
            raise DataError(f"{path} knows the classes {', '.join(trained_on)}; the data has {', '.join(classes)}")
        model = self._network(path, state, recipe, classes)
        if self.wing and not is_twin(model):
            raise RecipeError(f"--wing {self.wing}: {path} has no two-wing layers")
        attacks = attacks_named(self.attacks or ("clean", f"pgd{recipe.evaluation.steps}"))
        if self.transfer:
            source = self._network(Path(self.transfer), read_state_dict(self.transfer), recipe, classes)
            attacks += (transfer(f"pgd{recipe.evaluation.steps}", source),)
        file = self._record(run)
        parts = Path(f"{self.save_images}.parts") if self.save_images and file else None
        sampler = batches.test.batch_sampler

        def measured(record: Record, processes: Processes, warn: bool) -> Results:
            sampler.processes = processes
            images = len(batches.test.dataset) // processes.count
            with Progress(images, 0, "image", processes.is_first) as progress, Interruption():
                return robust_accuracy(
                    model,
                    batches.test,
                    attacks,
                    eps=self.eps or (recipe.attack.eps,),
                    device=self.device,
                    wing=self.wing,
                    classes=classes,
                    record=record,
                    keep_images=self.save_images is not None,
                    warn=warn,
                    progress=progress,
                    norm=recipe.attack.norm,
                    alpha=recipe.evaluation.alpha,
                    amp_dtype=AMP_DTYPES[recipe.run.amp],
                    engine=recipe.attack.engine,
                    chunk_size=recipe.attack.chunk_size,
                    seed=recipe.run.seed,
                )

        try:
            if processes.count > 1:
                if file is None:
                    raise RecipeError("several processes need a file for what they have measured: say --json FILE")
                if processes.rank < len(sampler):
                    measured(Record(file, parts, self.again), processes, warn=False)
                processes.wait()
                if not processes.is_first:
                    return
            results = measured(Record(file, parts, self.again and processes.count == 1), ALONE, self.alarms)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*([f"the same command goes on, by {file}"] if file else [])) from None
        print(results)
        if self.per_class:
            print(f"\n{results.per_class()}")
        about = {"checkpoint": str(path), "step": meta.get("step"), "wing": self.wing}
        about |= {"dataset": recipe.data.dataset, "torch": torch.__version__}
        about |= {"alpha": recipe.evaluation.alpha, "amp": recipe.run.amp, "seed": recipe.run.seed}
        found = (json.dumps(about | results.to_plain(), indent=2) + "\n").encode()
        if path == run.best and file == run.evaluation and self.wing != "frozen":
            write_atomically(run.evaluated, found)
        if self.json:
            write_atomically(self.json, found)
        if self.csv:
            write_atomically(self.csv, results.to_csv().encode())
        if self.picture:
            draw_robustness(results, self.picture, f"{path}, {recipe.data.dataset}")
        if self.save_images:
            write_atomically(self.save_images, results.to_npz())
            self._draw_changes(model, results, recipe.data.batch_size)
            if parts:
                shutil.rmtree(parts, ignore_errors=True)

    def _network(self, path: Path, state: dict, recipe: Recipe, classes: tuple[str, ...]) -> nn.Module:
        head = state.get("fc_downstream.weight")
        if head is not None and len(head) != len(classes):
            raise DataError(f"{path} is a network of {len(head)} classes; the data has {len(classes)}")
        model = make_network(recipe.network, len(classes))
        if any(".main_bn." in name for name in state):
            convert_twin_bn(model)
        load_state(model, state, allow_missing=("fc", "mean", "std"), allow_extra=("fc",))
        return model.to(self.device).eval()

    def _record(self, run: RunFolder) -> Path | None:
        """Where to keep what is measured: in the run's folder or, without one to write into, beside what is written."""
        if run.exists() and os.access(run.folder, os.W_OK):
            return run.evaluation
        written = self.json or self.csv or self.save_images
        return Path(written).with_suffix(".jsonl") if written else None

    def _draw_changes(self, model: nn.Module, results: Results, batch_size: int) -> None:
        tried = [column for column in results.columns if column.attack.attacks]
        target = Path(self.save_images)

        def probabilities(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), nullcontext() if self.wing is None else wings(model, self.wing):
                logits = [model(part.to(self.device)) for part in images.split(batch_size)]
            return torch.cat(logits).softmax(1).cpu()

        if tried:
            strongest = min(tried, key=lambda column: column.accuracy)
            draw_changes(results, strongest, probabilities, target.with_name(f"{target.stem}-changes.png"))

    def _checkpoint(self) -> Path:
        if self.source == "embedded":
            return assets.NETWORK
        path = Path(self.source)
        if path.is_dir() and not RunFolder(path).best.exists():
            raise RecipeError(f"{self.source!r} holds no best.safetensors")
        return RunFolder(path).best if path.is_dir() else path

    def _recipe(self, path: Path, own: Recipe | None) -> Recipe:
        recipe = recipe_of(self.recipe, self.config) or own
        if recipe is None:
            raise RecipeError(f"{path} does not say how it was made; --recipe or --config is needed")
        sections = {
            "data": {"batch_size": self.batch_size, "workers": self.workers},
            "network": {"arch": self.arch, "checkpoint": "none"},
            "attack": {"norm": self.norm, "eps": max(self.eps, default=None)},
            "evaluation": {"alpha": self.alpha, "steps": self.steps, "images": self.n, "choose_on": "test"},
            "run": {"amp": self.amp},
        }
        return recipe.replaced(
            **{name: {k: v for k, v in fields.items() if v is not None} for name, fields in sections.items()}
        )


@dataclass(frozen=True)
class Plot:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")]
    """Run folders; they need not have ended."""
    output: Annotated[str, _own("FILE")] = "runs.png"
    """The picture, a .png or an .svg file."""

    def __call__(self) -> None:
        if not self.output.lower().endswith(FORMATS):
            raise ValueError(f"--output {self.output}: the name must end in {' or '.join(FORMATS)}")
        lines = {label: run.read_metrics() for label, run in labelled(self.runs).items()}
        draw_runs(lines, self.output, ", ".join(lines))
        print(f"written to {self.output}")


@dataclass(frozen=True)
class Compare:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")]
    """Run folders; they need not have ended."""
    json: Annotated[str | None, _own("FILE")] = None
    """Also write the figures into this file."""
    csv: Annotated[str | None, _own("FILE")] = None
    """Also write the figures as a table for other programs."""

    def __call__(self) -> None:
        rows = compared(labelled(self.runs))
        print(comparison_table(rows))
        if self.json:
            write_atomically(self.json, (json.dumps(rows, indent=2) + "\n").encode())
        if self.csv:
            write_atomically(self.csv, comparison_csv(rows).encode())


@dataclass(frozen=True)
class PrintRecipe:
    name: Annotated[Positional[str | None], _own("NAME")] = None
    """Name of the recipe to print."""

    def __call__(self) -> None:
        if self.name is not None:
            print(recipe_as_toml(get_recipe(self.name)), end="")
            return
        for recipe in RECIPES.values():
            print(f"{recipe.name:14} {recipe.method.name} on {recipe.data.dataset}, {recipe.network.arch}")


@dataclass(frozen=True)
class Pretrain:
    data_root: Annotated[str | None, _own("D")] = None
    """The .npz file of CIFAR-10: train [50000, 32, 32, 3] uint8, train_labels, test, test_labels."""
    out: Annotated[str, arg(metavar="D")] = "assets"
    """Folder of the network and the images."""
    run: Annotated[str, arg(metavar="RUN")] = "runs/mini-pretrain"
    """Folder of the training runs."""
    epochs: Annotated[int | None, _own("N")] = None
    """Instead of the recipe's."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""

    def __call__(self) -> None:
        _check_device(self.device)
        recipe, command = get_recipe("mini-pretrain"), "twins-fast pretrain --data-root cifar10.npz"
        if self.epochs is not None:
            recipe = recipe.replaced(optimizer={"epochs": self.epochs})
            command += f" --epochs {self.epochs}"
        record = pretrain(recipe, Path(self.run), self.data_root, self.device, Path(self.out), command)
        print(json.dumps(record, indent=2))


@dataclass(frozen=True)
class Convert:
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """File to read."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """File to write."""
    wings: Literal[WINGS] = "keep"
    """What becomes of two-wing batch norms: kept, only one wing, or both made from one."""

    def __call__(self) -> None:
        summary = convert_checkpoint(self.source, self.target, wings=self.wings)
        print(f"{self.target}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))


@dataclass(frozen=True)
class Qualify:
    device: Annotated[str, _own("DEVICE")] = "cuda"
    """The GPU."""
    again: bool = False
    """Even if there is a verdict."""

    def __call__(self) -> None:
        _check_device(self.device)
        for subject, found in qualify(self.device, again=self.again).items():
            print(f"{subject}: {found.outcome} {found.reason}".rstrip())


@dataclass(frozen=True)
class Info:
    def __call__(self) -> None:
        print_info()


def recipe_of(name: str | None, config: str | None) -> Recipe | None:
    """The recipe that ``--recipe`` or ``--config`` asks for, None if neither does.

    Raises:
        RecipeError: both, or no such recipe.
        OSError: the file cannot be read.
    """
    if name and config:
        raise RecipeError("--recipe and --config exclude each other")
    if name:
        return get_recipe(name)
    return read_recipe(config) if config else None


def _qualify_first(device: str, wanted: bool, processes: Processes = ALONE) -> None:
    """Whatever becomes of it, the command goes on: without a verdict, by plain PyTorch."""
    if not wanted or torch.device(device).type != "cuda":
        return
    try:
        if processes.is_first_here:
            qualify(device)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"the device could not be checked, so that plain PyTorch runs: {error}")
    processes.wait()


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"no device {name!r} here ({str(error).splitlines()[0]})") from None


def _meta(path: Path) -> dict:
    """What a run wrote beside the network; nothing for other people's checkpoints."""
    try:
        return read_meta(path)
    except CheckpointError:
        return {}
