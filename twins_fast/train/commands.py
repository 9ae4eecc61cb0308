"""The commands: each a dataclass of its arguments that is called to run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal

import torch
from tyro.conf import Positional, arg

from twins_fast.checkpoints import CheckpointError, convert_checkpoint, load_checkpoint, load_state, read_state_dict
from twins_fast.evaluation import evaluate
from twins_fast.methods import METHODS
from twins_fast.nn import convert_twin_bn
from twins_fast.train.build import autocast, checkpoint_path, evaluation_attack, make_network
from twins_fast.train.config_file import read_recipe, recipe_as_toml
from twins_fast.train.datasets import DataError
from twins_fast.train.info import print_info
from twins_fast.train.pretrain import pretrain
from twins_fast.train.recipe import M, Recipe, RecipeError
from twins_fast.train.recipes import RECIPES, get_recipe
from twins_fast.train.run import data_loaders, run_with_baselines
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.tables import result_table


def _own(metavar: str):
    """Annotation: an argument of the command itself, which need not be given."""
    return arg(metavar=metavar, help_behavior_hint="")


_Fields = arg(name="")  # the recipe's sections stand beside the command's own arguments
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Train(Generic[M]):
    """Fine-tune a network by a recipe; every field of the recipe can be overridden."""

    fields: Annotated[Recipe[M], _Fields]
    recipe: Annotated[str | None, _own("{" + ",".join(RECIPES) + "}")] = None
    """Where to start from."""
    config: Annotated[str | None, _own("FILE")] = None
    """A recipe of your own in TOML, as twins-fast recipes NAME prints one."""
    method: Annotated[str | None, _own("{" + ",".join(METHODS) + "}")] = None
    """Instead of the recipe's method."""
    run: Annotated[str | None, _own("RUN")] = None
    """Folder to write (default: runs/RECIPE-METHOD-TIME)."""
    resume: Annotated[str | None, _own("RUN")] = None
    """Resume an interrupted run."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""

    def __call__(self) -> None:
        _check_device(self.device)
        if self.resume and self.run:
            raise RecipeError("--run and --resume exclude each other")
        recipe, data_root, folder = _absolute(self.fields), self.data_root, self.run or self.resume
        if self.resume:
            own = RunFolder(self.resume)
            own.check_recipe(recipe)
            data_root = data_root or own.load_config()[1]
        elif not (self.recipe or self.config):
            raise RecipeError(f"--recipe or --config is needed; choose from {', '.join(RECIPES)}")
        folder = Path(folder or f"runs/{recipe.name}-{recipe.method.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        print(result_table(run_with_baselines(recipe, folder, data_root, self.device, resume=bool(self.resume))))
        print(f"\nwritten to {folder}")


@dataclass(frozen=True)
class Eval(Generic[M]):
    """Measure a network clean and under attack; what a run wrote says its recipe itself."""

    fields: Annotated[Recipe[M], _Fields]
    recipe: Annotated[str | None, _own("{" + ",".join(RECIPES) + "}")] = None
    """Where to start from."""
    config: Annotated[str | None, _own("FILE")] = None
    """A recipe of your own in TOML, as twins-fast recipes NAME prints one."""
    wing: Annotated[Literal["adaptive", "frozen"] | None, _own("{adaptive,frozen}")] = None
    """Of a two-wing network (default: adaptive)."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""

    def __call__(self) -> None:
        _check_device(self.device)
        recipe = _absolute(self.fields)
        if recipe.network.checkpoint is None:
            raise RecipeError("--checkpoint is needed")
        path = checkpoint_path(recipe.network.checkpoint)
        state, meta = read_state_dict(path), _meta(path)
        own = _recipe_in(meta)
        if not (self.recipe or self.config or own):
            raise RecipeError(f"{path} does not say how it was made; --recipe or --config is needed")
        batches, classes = data_loaders(recipe.data, recipe.evaluation, self.data_root, recipe.run.seed)
        trained_on = tuple(meta.get("classes", ())) or (own.data.classes if own else ())
        if trained_on and trained_on != classes:
            raise DataError(f"{path} knows the classes {', '.join(trained_on)}; the data has {', '.join(classes)}")
        model = make_network(recipe.replaced(network={"checkpoint": None}).network, len(classes))
        if any(".main_bn." in name for name in state):
            convert_twin_bn(model)
        elif self.wing:
            raise RecipeError(f"--wing {self.wing}: {path} has no two-wing layers")
        load_state(model, state, allow_missing=("fc", "mean", "std"), allow_extra=("fc",))
        model.to(self.device)
        started = time.monotonic()
        with autocast(recipe.run.amp, self.device):
            attack = evaluation_attack(recipe, model)
            accuracy = evaluate(model, batches.test, attack, device=self.device, wing=self.wing)
        print(
            f"clean {accuracy.clean:.2%}, under PGD-{recipe.evaluation.steps} ({recipe.attack.norm}, "
            f"eps {recipe.attack.eps:.5f}) {accuracy.robust:.2%}, on {accuracy.images} images of "
            f"{recipe.data.dataset} in {time.monotonic() - started:.0f} s"
        )


@dataclass(frozen=True)
class PrintRecipe:
    """List the recipes, or print one as TOML, to be changed and given to --config."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """Of the recipe."""

    def __call__(self) -> None:
        if self.name is not None:
            print(recipe_as_toml(get_recipe(self.name)), end="")
            return
        for recipe in RECIPES.values():
            print(f"{recipe.name:14} {recipe.method.name} on {recipe.data.dataset}, {recipe.network.arch}")


@dataclass(frozen=True)
class Pretrain(Generic[M]):
    """Make the embedded network and images from CIFAR-10."""

    fields: Annotated[Recipe[M], _Fields]
    out: str = "assets"
    """Folder of the assets."""
    run: str = "runs/mini-pretrain"
    """Folder of the training runs."""
    data_root: Annotated[str | None, _own("D")] = None
    """Folder or .npz file of the data set."""
    device: Annotated[str, _own("DEVICE")] = _DEVICE
    """Where to compute; the first GPU, or else the CPU."""

    def __call__(self) -> None:
        _check_device(self.device)
        record = pretrain(_absolute(self.fields), Path(self.run), self.data_root, self.device, Path(self.out))
        print(json.dumps(record, indent=2))


@dataclass(frozen=True)
class Convert:
    """Turn any supported checkpoint into safetensors."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """File to read."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """File to write."""
    wings: Literal["keep", "adaptive", "frozen", "twin"] = "keep"
    """What becomes of two-wing batch norms: kept, only one wing, or both made from one."""

    def __call__(self) -> None:
        summary = convert_checkpoint(self.source, self.target, wings=self.wings)
        print(f"{self.target}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))


@dataclass(frozen=True)
class Info:
    """Versions, devices, and which backend runs what."""

    def __call__(self) -> None:
        print_info()


def base_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe that the command's arguments override: the kind of its method decides which arguments there are.

    Raises:
        RecipeError, RunError: no such recipe, file or run.
    """
    if "--recipe" in argv and "--config" in argv:
        raise RecipeError("--recipe and --config exclude each other")
    name, config, resume = (_value(argv, flag) for flag in ("--recipe", "--config", "--resume"))
    checkpoint, method = _value(argv, "--checkpoint"), _value(argv, "--method")
    if name:
        recipe = get_recipe(name)
    elif config:
        recipe = read_recipe(config)
    elif resume:
        recipe, _ = RunFolder(resume).load_config()
    elif checkpoint and argv[0] == "eval" and (own := _recipe_in(_meta(checkpoint_path(checkpoint)))):
        recipe = own
    else:
        recipe = get_recipe("cifar10")  # shows the defaults in the help; no command runs it
    return recipe.replaced(method=method) if method else recipe


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, if it is there."""
    words = [word for argument in argv for word in argument.split("=", 1 if argument.startswith(flag + "=") else 0)]
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


def _absolute(recipe: Recipe) -> Recipe:
    """With the checkpoint's path made absolute, since a resume may start elsewhere."""
    checkpoint = recipe.network.checkpoint
    if checkpoint in (None, "embedded"):
        return recipe
    return recipe.replaced(network={"checkpoint": str(Path(checkpoint).resolve())})


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"no device {name!r} here ({str(error).splitlines()[0]})") from None


def _meta(path: str) -> dict:
    """What a run wrote beside the network; nothing for other people's checkpoints."""
    try:
        return load_checkpoint(path)[1]
    except CheckpointError:
        return {}


def _recipe_in(meta: dict) -> Recipe | None:
    return Recipe.from_dict(meta["recipe"]) if "recipe" in meta else None
