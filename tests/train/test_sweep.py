"""Sweeps: their settings, that they go on where they were, choose by validation images, and survive what fails."""

import json
import random
import threading
import time

import numpy as np
import pytest

from tests.train.helpers import TINY, refused
from twins_fast.train import cli, sweep
from twins_fast.train.recipes import get_recipe
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.settings import applied, axis_of, label_of, settings_of
from twins_fast.train.sweep_results import chosen, mean_and_deviation

MINI = get_recipe("mini")
OPTIONS = [option for option in TINY if option not in ("--evaluation.choose-on", "test")]


def settings(*axes, **more):
    return settings_of(MINI, [axis_of(axis) for axis in axes], **more)


def command(folder, npz, *more):
    start = ["sweep", "--recipe", "mini-pretrain", "--folder", str(folder), "--data-root", str(npz), *OPTIONS]
    return [*start, "--workers", "0", "--epochs", "1", "--evaluation.validation-part", "0.25", *more]


@pytest.fixture
def in_process(monkeypatch):
    """Commands of the runs, carried out here, where the tiny network is known; a list of them."""
    done = []

    def run(self, command, log):
        done.append(command)
        status = cli.main(command)
        return f"exit status {status}" if status else ""

    monkeypatch.setattr(sweep._Processes, "run", run)
    return done


def test_a_grid_has_every_setting_once_without_what_a_method_lacks():
    found = settings("method=at,twins-at", "method.frozen_weight=0.5,1", "optimizer.milestones=[3,4],[],[3,4]")
    names = [label_of(setting) for setting in found]
    assert names[:2] == ["at milestones=3-4", "at milestones="]
    assert names[2:] == [f"twins-at frozen_weight={w} milestones={m}" for w in (0.5, 1) for m in ("3-4", "")]
    recipe = applied(MINI, found[-1])
    assert recipe.method.frozen_weight == 1 and recipe.optimizer.milestones == ()
    assert applied(MINI, settings("attack.eps=4/255")[0]).attack.eps == 4 / 255
    assert settings() == [{}]


def test_draws_lie_in_their_ranges_and_more_of_them_go_on():
    axes = ("optimizer.lr=log-uniform(1e-3, 1e-1)", "attack.eps=uniform(1/255,8/255)", "method=at,trades")
    few, many = settings(*axes, draws=5), settings(*axes, draws=200)
    assert many[:5] == few and len(many) == 200 and settings(*axes, draws=5, seed=1) != few
    rates = np.array([setting["optimizer.lr"] for setting in many])
    assert 1e-3 <= rates.min() and rates.max() <= 0.1 and 0.4 < (rates < 1e-2).mean() < 0.6
    assert {setting["method.name"] for setting in many} == {"at", "trades"}
    assert axis_of("a.b=uniform(0,1)").draw(random.Random(0)) == 0.844


@pytest.mark.parametrize(
    "axes, message",
    [
        (["optimizer.lr"], "write FIELD=A,B"),
        (["lr=1"], "'lr' is not the full name of a field"),
        (["optimizer.rate=1"], "unknown optimizer fields: rate"),
        (["optimizer.lr=fast"], "'fast' is not a number"),
        (["method=fat"], "unknown method 'fat'"),
        (["method=at", "method.frozen_weight=1"], "no method of the sweep has the option method.frozen_weight"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "each field can be varied once"),
        (["optimizer.lr=uniform(0,1)"], "optimizer.lr: a range needs --draws N"),
        (["optimizer.lr=log-uniform(0,1)"], "a range goes up, from above 0"),
        (["optimizer.lr=uniform(1,x)"], "'x' is not a number"),
        (["run.seed=1,2"], "named by --seeds"),
        (["--seeds", ""], "--seeds and --devices name one each"),
        (["--attacks", "fat"], "'fat'"),
        (["--devices", "cpu,cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(tmp_path, capsys, axes, message):
    assert message in refused(capsys, "sweep", "--recipe", "mini", "--folder", str(tmp_path / "sweep"), *axes)
    assert not (tmp_path / "sweep").exists()


def test_one_failure_does_not_end_it_and_the_rest_is_chosen_measured_and_kept(tmp_path, npz, in_process, capsys):
    folder = tmp_path / "sweep"
    axes = ["method=at,twins-at", "optimizer.lr=0.05,1e30"]
    more = ["--chosen-seeds", "0,1", "--attacks", "clean,pgd3", "--n", "6"]
    assert cli.main(command(folder, npz, *axes, *more)) == 2
    said = capsys.readouterr()
    assert "of 2 runs there is no result" in said.err and "twins-at lr=1e+30 seed=0: exit status 2" in said.err
    record = json.loads((folder / "sweep.json").read_text())
    assert [row["label"] for row in record["chosen"]] == ["at lr=0.05", "twins-at lr=0.05"]
    assert [row["seeds"] for row in record["chosen"]] == [[0, 1], [0, 1]]
    assert [row["seeds"] for row in record["settings"]] == [[0], [], [0], []]
    figures = record["chosen"][0]["figures"]
    assert {"validation robust", "clean, best", "robust, last", "best minus last", "PGD-3, 6 images"} <= figures.keys()
    result = RunFolder(folder / "at,lr=0.05" / "seed-1").read_result()
    assert figures["robust, last"][1] == result["after"]["robust"] and result["best"]["chosen_on"] == "validation"
    assert f"| at lr=0.05 | 2 | {mean_and_deviation(figures['clean, best'])} |" in said.out
    assert (folder / "sweep.md").read_text() in said.out
    kinds = [words[0] for words in in_process]
    assert kinds.count("train") == 6 and kinds.count("eval") == 4

    in_process.clear()  # again: only what failed is trained
    assert cli.main(command(folder, npz, *axes, *more)) == 2
    assert [words[words.index("--resume") + 1][-18:] for words in in_process if words[0] == "train"] == [
        "at,lr=1e+30/seed-0",
        "at,lr=1e+30/seed-0",
    ]


def test_a_run_that_another_process_has_is_waited_for(tmp_path, npz, in_process, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "LOOK_EVERY_SECONDS", 0.05)
    folder = tmp_path / "sweep"
    other = RunFolder(folder / "recipe" / "seed-0")
    taken, given_back = threading.Event(), threading.Event()

    def hold():
        with other.locked():
            taken.set()
            time.sleep(1)
            given_back.set()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    assert cli.main(command(folder, npz)) == 0
    holder.join()
    assert given_back.is_set() and "[1/1] seed=0: clean" in capsys.readouterr().out


def test_a_run_that_cannot_be_read_is_a_failure_of_its_own(tmp_path, npz, in_process, capsys):
    folder, axes = tmp_path / "sweep", ["method=at,twins-at"]
    assert cli.main(command(folder, npz, *axes)) == 0
    metrics = RunFolder(folder / "at" / "seed-0").metrics
    metrics.write_text("{broken\n" + metrics.read_text())
    capsys.readouterr()
    assert cli.main(command(folder, npz, *axes)) == 2
    said = capsys.readouterr()
    assert "at seed=0" in said.err and "line 1 is broken" in said.err and "| twins-at | 1 of 1 |" in said.out


def test_a_folder_of_another_recipe_is_not_touched(tmp_path, npz, in_process, capsys):
    assert cli.main(command(tmp_path, npz)) == 0
    before = (tmp_path / "recipe" / "seed-0" / "last.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.main(command(tmp_path, npz, "--lr", "0.1")) == 2
    assert "belongs to another recipe: optimizer.lr is 0.05, asked 0.1" in capsys.readouterr().err
    assert (tmp_path / "recipe" / "seed-0" / "last.safetensors").read_bytes() == before


def test_the_best_mean_on_validation_images_is_chosen_of_each_method():
    def row(label, method, robust, asked=2):
        figures = {"validation robust": robust, "validation clean": [1 - value for value in robust]}
        return {"label": label, "method": method, "seeds": list(range(len(robust))), "asked": asked, "figures": figures}

    rows = [
        row("a", "at", [0.2, 0.4]),
        row("b", "at", [0.3, 0.4]),
        row("c", "at", [0.9]),
        row("d", "trades", [0.1] * 2),
    ]
    assert [found["label"] for found in chosen(rows)] == ["b", "d"]
    assert [found["label"] for found in chosen(rows, "clean")] == ["a", "d"]


def test_means_and_deviations():
    assert mean_and_deviation([0.5, 0.7]) == "60.0 ± 14.1 %" and mean_and_deviation([0.5]) == "50.0 %"
    assert mean_and_deviation([]) == "" and mean_and_deviation([-0.01, -0.03], "+.1f") == "-2.0 ± 1.4 %"
