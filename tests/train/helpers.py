"""Whole runs of a tiny network, through the command line."""

import torch

from twins_fast.checkpoints import load_checkpoint
from twins_fast.models import ARCHITECTURES
from twins_fast.train import cli
from twins_fast.train.run_folder import RunFolder

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
TINY += ["--checkpoint", "none", "--amp", "none", "--evaluation.images", "0", "--evaluation.choose-on", "test"]
TINY += ["--attack.engine", "eager"]  # a plan takes a second to make


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


def assert_same_run(left, right):
    """Bit-equal checkpoints and metrics, times apart."""
    for name in ("last.safetensors", "best.safetensors"):
        (a, meta_a), (b, meta_b) = load_checkpoint(left / name), load_checkpoint(right / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert meta_a == meta_b and (left / name).read_bytes() == (right / name).read_bytes()

    def lines(folder):
        return [
            {k: v for k, v in line.items() if k not in ("images_per_second", "seconds")}
            for line in RunFolder(folder).read_metrics()
        ]

    assert lines(left) == lines(right)


# A recipe as version 0.1 wrote it into a run folder.
# fmt: off
OLD_RECIPE = {
    "name": "mini-pretrain", "dataset": "npz", "arch": "tiny", "checkpoint": None, "method": "twins-trades",
    "beside": ["trades"], "classes": [], "epochs": 2, "batch_size": 8, "lr": 0.05, "momentum": 0.9,
    "weight_decay": 0.0005, "schedule": "multistep", "milestones": [1], "lr_gamma": 0.1, "warmup": 0.3,
    "twins_lambda": 0.4, "trades_beta": 5.0, "adversary": "trades", "norm": "linf", "eps": 0.03137254901960784,
    "alpha": 0.01568627450980392, "steps": 2, "eval_alpha": 0.00784313725490196, "eval_steps": 2, "eval_images": 0,
    "eval_every": 1, "eval_before": False, "augmentation": "cifar", "upsample": None, "amp": None, "engine": "auto",
    "channels_last": True, "seed": 0, "workers": 0,
}
# fmt: on
