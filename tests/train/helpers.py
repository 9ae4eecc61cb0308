"""Whole runs of a tiny network, through the command line."""

from twins_fast.models import ARCHITECTURES
from twins_fast.train import cli

# Runs in a subprocess too, where monkeypatch does not reach. Width 8: with fewer channels oneDNN 3.13 corrupts the heap
# in the channels-last backward pass of a strided 1x1 convolution on AVX2.
REGISTER_TINY = (
    "from twins_fast.models import CifarResNet, register; from functools import partial; "
    "register('tiny', partial(CifarResNet, width=8, blocks=(1, 1)))"
)
if "tiny" not in ARCHITECTURES:
    exec(REGISTER_TINY)

TINY = ["--arch", "tiny", "--epochs", "2", "--batch-size", "8", "--steps", "2", "--evaluation.steps", "2"]
TINY += ["--lr", "0.05", "--data.classes", "", "--optimizer.schedule", "multistep", "--optimizer.milestones", "1"]
TINY += ["--checkpoint", "none", "--evaluation.images", "0", "--evaluation.choose-on", "test"]


def train(folder, npz, *more):
    """Exit status of a run of the tiny network."""
    return cli.main(["train", "--recipe", "mini-pretrain", "--run", str(folder), "--data-root", str(npz), *TINY, *more])


def refused(capsys, *arguments):
    """What a command says that is refused: one line."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("twins-fast: error: ") and said.count("\n") == 1, said
    return said
