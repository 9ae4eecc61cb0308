"""The command line: reads the arguments, runs a command, and says in one line what went wrong."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from typing import Annotated, Union

import tyro
from tyro.conf import subcommand

import twins_fast
from twins_fast.train.commands import Convert, Eval, Info, Pretrain, PrintRecipe, Train, base_recipe
from twins_fast.train.recipe import RecipeError
from twins_fast.train.recipes import get_recipe
from twins_fast.train.trainer import TrainingError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for a clear error, 130 for an interrupt)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = _parse(argv)
        if command is not None:
            command()
    except (ValueError, TypeError, TrainingError, OSError) as error:
        print(f"twins-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("twins-fast: interrupted (train --resume RUN resumes from its last checkpoint)", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str]):
    """The command with its arguments; None if help was printed.

    Raises:
        ValueError: wrong arguments.
    """
    recipe, pretrain = base_recipe(argv), get_recipe("mini-pretrain")
    train, evaluation = Train[type(recipe.method)], Eval[type(recipe.method)]
    commands = (
        Annotated[train, subcommand("train", default=train(recipe))],
        Annotated[evaluation, subcommand("eval", default=evaluation(recipe))],
        Annotated[PrintRecipe, subcommand("recipes")],
        Annotated[Pretrain[type(pretrain.method)], subcommand("pretrain", default=Pretrain(pretrain))],
        Annotated[Convert, subcommand("convert-checkpoint")],
        Annotated[Info, subcommand("info")],
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Union[commands], prog="twins-fast", description=twins_fast.__doc__, args=argv)  # noqa: UP007
    except SystemExit as stop:
        if stop.code:
            raise RecipeError(_one_line(said.getvalue())) from None
        return None


def _one_line(box: str) -> str:
    """The message out of tyro's box, which is drawn in ASCII where the terminal knows no other characters."""
    blocks = [[]]
    for line in box.splitlines():
        line = line.strip(" │")
        if re.match(r"[╭╰]|[─-]{8,}$", line):
            blocks.append([])
        elif line:
            blocks[-1].append(line)
    blocks = list(filter(None, blocks))
    message = " ".join(blocks[0] if "╭" in box else blocks[1])  # in ASCII the title is a block of its own
    return re.sub(r"^Error parsing \S*\bfields\b\S*: ", "", message)
