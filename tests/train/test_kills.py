"""SIGKILL at random moments, twenty in a row: the figures at the end are those of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import twins_fast
from tests.train.helpers import REGISTER_TINY, TINY, assert_same_run
from twins_fast.train.run_folder import RunFolder

pytestmark = pytest.mark.slow
KILLS = 20
PROGRAM = f"""{REGISTER_TINY}
import sys
from twins_fast.train import cli, sweep, trainer
trainer.SAVE_EVERY_SECONDS = 0.0
sweep.COMMAND = (sys.executable, __file__)
sys.exit(cli.main())
"""


@pytest.fixture
def start(tmp_path):
    """Starts a command of twins-fast as a group of processes, which knows the tiny network."""
    main = tmp_path / "main.py"
    main.write_text(PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(twins_fast.__file__).parents[1])}
    return lambda *words: subprocess.Popen(
        [sys.executable, str(main), *map(str, words)], start_new_session=True, env=environment
    )


def killed_again_and_again(command, numbers):
    """Run it to its end; whoever starts it is killed KILLS times; which number it is then decides what else dies."""
    generator, kills = random.Random(0), 0
    while True:
        process = command(kills)
        try:
            wait = None if kills == KILLS else generator.uniform(*numbers)
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert status == 0
        return kills


def training(npz, *more):
    return ["--recipe", "mini-pretrain", "--data-root", npz, *TINY, "--workers", "0", *more]


def test_training(tmp_path, npz, start):
    words = training(npz, "--method", "twins-at", "--epochs", "150", "--regularisation.ema", "0.9")
    assert start("train", "--run", tmp_path / "whole", *words).wait() == 0
    cut = tmp_path / "cut"

    def command(kills):
        run = ["--resume", cut] if (cut / "config.json").exists() else ["--run", cut]
        return start("train", *run, *words)

    assert killed_again_and_again(command, (4, 9)) == KILLS
    assert_same_run(tmp_path / "whole", cut)


def test_sweep(tmp_path, npz, start):
    """The sweep alone is killed: its runs go on, and the next sweep waits for them."""
    words = training(npz, "method=at,twins-at", "--seeds", "0,1", "--epochs", "150")
    words += ["--evaluation.choose-on", "validation", "--evaluation.validation-part", "0.25"]
    assert start("sweep", "--folder", tmp_path / "whole", *words).wait() == 0
    assert killed_again_and_again(lambda kills: start("sweep", "--folder", tmp_path / "cut", *words), (4, 9)) > 5
    whole, cut = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("whole", "cut"))
    for record in (whole, cut):
        for row in record["settings"] + record["chosen"]:
            del row["figures"]["seconds"]
    assert whole == cut


def test_autoattack(tmp_path, start):
    generator, labels = np.random.default_rng(0), np.arange(40) % 5  # it needs four classes
    images = generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "five.npz", train=images, train_labels=labels, test=images, test_labels=labels)
    run = tmp_path / "run"
    words = training(tmp_path / "five.npz", "--method", "standard", "--epochs", "20")
    assert start("train", "--run", run, *words).wait() == 0

    def measured(name):
        words = ["--attacks", "clean,pgd10,autoattack", "--eps", "1/255,2/255,4/255,8/255", "--batch-size", "2"]
        return start("eval", run, *words, "--json", tmp_path / f"{name}.json")

    assert measured("whole").wait() == 0
    RunFolder(run).evaluation.unlink()
    assert killed_again_and_again(lambda kills: measured("cut"), (4, 9)) > 5
    found = []
    for name in ("whole", "cut"):
        results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
        found.append([{key: value for key, value in one.items() if key != "seconds"} for one in results])
    assert found[0] == found[1]
