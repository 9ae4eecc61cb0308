"""The command line: reads the arguments, runs a command, and says in one line what went wrong.

``--help`` and ``--version`` do without PyTorch, whose import takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Union

from twins_fast import __version__

COMMANDS = {
    "train": "fine-tune a network by a recipe; every field of the recipe can be overridden",
    "sweep": "train many settings and seeds of a recipe, choose by validation, and measure what was chosen",
    "eval": "measure a network clean and under attack; what is not said is as in the run, or in the recipe",
    "plot": "draw what runs have recorded, one or several of them in one picture",
    "compare": "print a table of what several runs reached, and of what is different in their recipes",
    "recipes": "list the recipes, or print one as TOML, to be changed and given to train --config",
    "pretrain": "make the network and the images that come with the package from CIFAR-10",
    "convert-checkpoint": "turn any supported checkpoint into safetensors",
    "qualify": "find out whether the kernels are right and faster on a GPU, so that they run there",
    "info": "versions, devices, and which backend runs what",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for a clear error, 130 for an interrupt)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"twins-fast {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}")

    from twins_fast.train.trainer import TrainingError

    try:
        command = _parse(argv)
        if command is not None:
            command()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, TrainingError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"twins-fast: interrupted{''.join(f'; {part}' for part in interrupt.args)}", file=sys.stderr)
        return 130
    return 0


def _overview() -> str:
    rows = "\n".join(f"  {name:20}{sentence}" for name, sentence in COMMANDS.items())
    return (
        "usage: twins-fast COMMAND [OPTIONS]\n\n"
        "Adversarial fine-tuning of robust networks with two-wing batch norm (TWINS, arXiv 2303.11135).\n\n"
        f"{rows}\n\ntwins-fast COMMAND --help says what a command takes; twins-fast --version prints the version."
    )


def _fail(message: str) -> int:
    print(f"twins-fast: error: {message}", file=sys.stderr)
    return 2


def _parse(argv: list[str]):
    """The command with its arguments; None if help was printed.

    Raises:
        ValueError: wrong arguments.
    """
    import tyro
    from tyro.conf import subcommand

    from twins_fast.train.commands import (
        Compare,
        Convert,
        Eval,
        Info,
        Plot,
        Pretrain,
        PrintRecipe,
        Qualify,
        Sweep,
        Train,
    )

    recipe = _base_recipe(argv if argv[0] in ("train", "sweep") else ())
    train, sweep = (kind[type(recipe.method)] for kind in (Train, Sweep))
    kinds = (train, sweep, Eval, Plot, Compare, PrintRecipe, Pretrain, Convert, Qualify, Info)
    commands = tuple(
        Annotated[
            kind,
            subcommand(name, description=sentence, **({"default": kind(recipe)} if kind in (train, sweep) else {})),
        ]
        for (name, sentence), kind in zip(COMMANDS.items(), kinds, strict=True)
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Union[commands], prog="twins-fast", args=argv)  # noqa: UP007
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(said.getvalue())) from None
        return None


def _base_recipe(argv: Sequence[str]):
    """The recipe that the arguments of ``train`` override: the kind of its method decides which arguments there are.

    Raises:
        RecipeError, RunError: no such recipe, file or run.
    """
    from twins_fast.train.commands import recipe_of
    from twins_fast.train.recipes import get_recipe
    from twins_fast.train.run_folder import RunFolder

    name, config, resume, method = (_value(argv, flag) for flag in ("--recipe", "--config", "--resume", "--method"))
    recipe = recipe_of(name, config)
    if recipe is None and resume:
        recipe, _ = RunFolder(resume).load_config()
    if recipe is None:
        recipe = get_recipe("cifar10")  # shows the defaults in the help; no command runs it
    return recipe.replaced(method=method) if method else recipe


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, if it is there."""
    words = [word for argument in argv for word in argument.split("=", 1 if argument.startswith(flag + "=") else 0)]
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


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
