"""The command line: train, eval, pretrain, convert-checkpoint, info."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import types
import typing
from pathlib import Path

import torch

from twins_fast.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    load_checkpoint,
    load_state,
    read_state_dict,
)
from twins_fast.evaluation import evaluate
from twins_fast.nn import convert_twin_bn
from twins_fast.train import assets, data
from twins_fast.train.info import print_info
from twins_fast.train.pretrain import pretrain
from twins_fast.train.recipes import RECIPES, Recipe, RecipeError, get_recipe
from twins_fast.train.run import Run
from twins_fast.train.tables import result_table
from twins_fast.train.trainer import TrainingError, autocast, eval_attack, make_network, run_recipe

_NONE = object()  # "none" on the command line; None means that the field was not asked for
_FIELDS = [field for field in dataclasses.fields(Recipe) if field.name not in ("name", "dataset")]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for a clear error, 130 for an interrupt)."""
    options = _parser().parse_args(argv)
    try:
        options.command(options)
    except (ValueError, TypeError, TrainingError, OSError) as error:
        print(f"twins-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("twins-fast: interrupted (train goes on from its last checkpoint with --resume RUN)", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twins-fast", description=__import__("twins_fast").__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune a network by a recipe")
    train.set_defaults(command=_train)
    train.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    folder = train.add_mutually_exclusive_group()
    folder.add_argument("--run", metavar="RUN", help="folder to write (default: runs/RECIPE-METHOD-TIME)")
    folder.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    _add_places(train)
    _add_overrides(train)

    evaluation = commands.add_parser("eval", help="measure a network clean and under attack")
    evaluation.set_defaults(command=_eval)
    evaluation.add_argument("--recipe", metavar="NAME", help="needed for a checkpoint that no run wrote")
    evaluation.add_argument("--wing", choices=("adaptive", "frozen"), help="of a two-wing network (default: adaptive)")
    _add_places(evaluation)
    _add_overrides(evaluation)

    pretrain = commands.add_parser("pretrain", help="make the embedded network and images from CIFAR-10")
    pretrain.set_defaults(command=_pretrain)
    pretrain.add_argument("--out", metavar="DIR", default="assets", help="where the assets go (default: assets)")
    pretrain.add_argument("--run", metavar="RUN", default="runs/mini-pretrain", help="folder of the training runs")
    _add_places(pretrain)
    _add_overrides(pretrain)

    convert = commands.add_parser("convert-checkpoint", help="turn any supported checkpoint into safetensors")
    convert.set_defaults(command=_convert)
    convert.add_argument("source")
    convert.add_argument("target")
    convert.add_argument("--wings", choices=("keep", "adaptive", "frozen", "twin"), default="keep")

    info = commands.add_parser("info", help="versions, devices, and which backend runs what")
    info.set_defaults(command=lambda options: print_info())
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", metavar="D", help="folder or .npz file of the data set")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("overrides of the recipe (pixel quantities in units of [0, 1])")
    hints = typing.get_type_hints(Recipe)
    for field in _FIELDS:
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if kind is bool:
            group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=None)
        else:
            group.add_argument(flag, dest=field.name, type=_reader(kind), metavar=_metavar(kind), default=None)


def _reader(kind):
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]

        def several(text: str) -> tuple:
            return tuple(item(part) for part in text.split(",") if part)

        return several
    if isinstance(kind, types.UnionType):
        item = next(part for part in typing.get_args(kind) if part is not type(None))

        def optional(text: str):
            return _NONE if text == "none" else item(text)

        return optional
    return _fraction if kind is float else kind


def _metavar(kind) -> str:
    if typing.get_origin(kind) is tuple:
        return "A,B,..."
    if isinstance(kind, types.UnionType):
        return "X|none"
    return kind.__name__


def _fraction(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or fraction") from None


def _device(text: str) -> str:
    """A device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here ({str(error).splitlines()[0]})") from None
    return text


def _overrides(options: argparse.Namespace) -> dict:
    """The fields that were asked for; a file as an absolute path, since a resume may start elsewhere."""
    asked = {field.name: getattr(options, field.name) for field in _FIELDS}
    asked = {name: None if value is _NONE else value for name, value in asked.items() if value is not None}
    if asked.get("checkpoint") not in (None, "embedded"):
        asked["checkpoint"] = str(Path(asked["checkpoint"]).resolve())
    return asked


def _train(options: argparse.Namespace) -> None:
    if options.resume:
        run = Run(options.resume)
        recipe, data_root = run.load_config()
        if options.recipe:
            run.check_recipe(get_recipe(options.recipe, **_overrides(options)))
        else:
            run.check_recipe(dataclasses.replace(recipe, **_overrides(options)))
        data_root = options.data_root or data_root
    else:
        if not options.recipe:
            raise RecipeError(f"--recipe is needed; choose from {', '.join(sorted(RECIPES))}")
        recipe = get_recipe(options.recipe, **_overrides(options))
        data_root = options.data_root
        run = Run(options.run or f"runs/{recipe.name}-{recipe.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    resume = bool(options.resume)
    results = [run_recipe(recipe, run, data_root, options.device, resume=resume)]
    for method in recipe.beside:
        other = dataclasses.replace(recipe, method=method, beside=(), eval_before=False)
        results.append(run_recipe(other, Run(run.folder / method), data_root, options.device, resume=resume))
    print(result_table(results))
    print(f"\nwritten to {run.folder}")


def _eval(options: argparse.Namespace) -> None:
    if options.checkpoint in (None, _NONE):
        raise RecipeError("--checkpoint is needed")
    path = assets.NETWORK if options.checkpoint == "embedded" else options.checkpoint
    state, meta = read_state_dict(path), _meta(path)
    if options.recipe:
        recipe = get_recipe(options.recipe, **_overrides(options))
    elif "recipe" in meta:
        recipe = dataclasses.replace(Recipe.from_dict(meta["recipe"]), **_overrides(options))
    else:
        raise RecipeError(f"{path} does not say how it was made; --recipe is needed")
    train_set, test_set, classes = data.load_datasets(recipe, options.data_root)
    trained_on = tuple(meta.get("classes") or meta.get("recipe", {}).get("classes", ()))
    if trained_on and trained_on != classes:
        raise data.DataError(f"{path} knows the classes {', '.join(trained_on)}; the data has {', '.join(classes)}")
    _, loader = data.loaders(recipe, train_set, test_set)
    model = make_network(dataclasses.replace(recipe, checkpoint=None, method="at"), len(classes))
    if any(".main_bn." in name for name in state):
        convert_twin_bn(model)
    elif options.wing:
        raise RecipeError(f"--wing {options.wing}: {path} has no two-wing layers")
    load_state(model, state, allow_missing=("fc", "mean", "std"), allow_extra=("fc",))
    model.to(options.device)
    started = time.monotonic()
    with autocast(recipe, options.device):
        accuracy = evaluate(model, loader, eval_attack(recipe, model), device=options.device, wing=options.wing)
    print(
        f"clean {accuracy.clean:.2%}, under PGD-{recipe.eval_steps} ({recipe.norm}, eps {recipe.eps:.5f}) "
        f"{accuracy.robust:.2%}, on {accuracy.images} images of {recipe.dataset} in {time.monotonic() - started:.0f} s"
    )


def _meta(path: str) -> dict:
    """What a run wrote beside the network; nothing for other people's checkpoints."""
    try:
        return load_checkpoint(path)[1]
    except CheckpointError:
        return {}


def _pretrain(options: argparse.Namespace) -> None:
    recipe = get_recipe("mini-pretrain", **_overrides(options))
    record = pretrain(recipe, Path(options.run), options.data_root, options.device, Path(options.out))
    print(json.dumps(record, indent=2))


def _convert(options: argparse.Namespace) -> None:
    summary = convert_checkpoint(options.source, options.target, wings=options.wings)
    print(f"{options.target}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
