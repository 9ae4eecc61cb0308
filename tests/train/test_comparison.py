"""``plot`` and ``compare``, on small runs that no network was trained for."""

import csv
import json

import pytest
import torch
from matplotlib import pyplot as plt

from tests.train.helpers import refused
from twins_fast.checkpoints import save_checkpoint
from twins_fast.train import cli
from twins_fast.train.recipes import get_recipe
from twins_fast.train.run_folder import RunFolder, labelled
from twins_fast.train.tables import result_table


def made(folder, epochs=4, lr=1e-2, ended=True, twin=True, dynamics=True, **recipe):
    """A run folder of ten steps an epoch, the last of ``epochs`` missing if it has not ended."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.create(get_recipe("mini", optimizer={"epochs": epochs, "lr": lr}, **recipe), None)
    done, wings = epochs if ended else epochs - 1, {"frozen_accuracy": 0.4, "frozen_loss": 2.0, "adaptive_loss": 1.5}
    for n in range(1, 10 * done + 1):
        at = {"step": n, "epoch": n / 10, "seconds": float(n)}
        own = wings | {"adaptive_accuracy": 0.6} if twin else {}
        run.log(kind="train", **at, loss=2 - n / 50, lr=0.1, accuracy=0.5, **own)
        if dynamics and n % 5 == 0:
            figures = {"batches": 5, "layers": ["a", "b"], "effective_lr": 0.1, "effective_lrs": [0.2, None]}
            for name in ("weight_norm", "distance", "gradient_norm", "gradient_variance"):
                figures |= {name: 4.0, f"{name}s": [1.0, 3.0]}
            shifts = {"wings": ["c"], **{name: 0.5 for name in ("mean_shift", "variance_shift")}} if twin else {}
            run.log(kind="dynamics", **at, **figures, **shifts)
        if n % 10 == 0:
            run.log(kind="test", **at, clean=0.8, robust=0.5 - 0.1 * (n > 10), images=100, robust_gap=0.1)
    if ended:
        figures = {"robust": 0.4, "clean": 0.8, "images": 400}
        best = figures | {"robust": 0.5, "epoch": 1, "chosen_on": "test"}
        run.result.write_text(json.dumps({"step": 10 * done, "after": figures, "best": best, "seconds": 90.0}))
    return str(folder)


def evaluate(folder, images, best=10, norm="linf"):
    """What an evaluation of the network of step 10 leaves; ``best`` is the step of the best one now."""
    run = RunFolder(folder)
    save_checkpoint(run.best, {"w": torch.zeros(1)}, {"step": best})
    found = [{"attack": "pgd100", "title": "PGD-100", "eps": 8 / 255, "accuracy": 0.345}]
    run.evaluated.write_text(json.dumps({"step": 10, "images": images, "norm": norm, "results": found}))


def table(capsys):
    """The head and the rows of what was printed."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    return head, rows


@pytest.fixture
def figures(monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    for figure in kept:
        plt.figure(figure).clear()
    monkeypatch.undo()
    plt.close("all")


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def test_runs_in_one_picture(tmp_path, figures, capsys):
    runs = [made(tmp_path / "x" / "run"), made(tmp_path / "y" / "run", method="at", twin=False), made(tmp_path / "z")]
    runs += [made(tmp_path / "old", ended=False, dynamics=False)]
    assert cli.main(["plot", *runs, runs[0], "--output", str(tmp_path / "all.svg")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'all.svg'}\n"
    assert b"<svg" in (tmp_path / "all.svg").read_bytes()
    drawn = panels(figures[0])
    assert len(drawn) == 11 and all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in drawn.values())
    names = ["x/run", "y/run", f"{tmp_path.name}/z", f"{tmp_path.name}/old"]
    assert figures[0].get_suptitle() == ", ".join(names)
    loss = drawn["training loss, each step and smoothed"]
    assert loss.get_legend_handles_labels()[1] == names
    colors = {line.get_label(): line.get_color() for line in loss.lines if line.get_label() in names}
    assert len(set(colors.values())) == 4
    weights, shifts = (drawn[t] for t in ("length of the weights", "running statistics, adaptive wing from frozen"))
    assert weights.get_legend_handles_labels()[1] == names[:3]
    assert [line.get_color() for line in weights.lines] == [colors[name] for name in names[:3]]
    assert shifts.get_legend_handles_labels()[1][:2] == ["x/run, means", "x/run, ln of variances"]
    assert list(weights.lines[0].get_xdata()) == [0.5 * n for n in range(1, 9)]
    effective = drawn["effective learning rate of the layers, median and quartiles"]
    assert effective.get_yscale() == "log" and effective.lines[0].get_ydata()[0] == 0.2
    gap = drawn["robust accuracy, training minus evaluation"]
    assert gap.lines[0].get_ydata()[0] == pytest.approx(10) and gap.get_ylabel() == "percentage points"


def test_one_run_without_measurements_has_fewer_panels(tmp_path, figures):
    run = made(tmp_path / "run", twin=False, dynamics=False)
    assert cli.main(["plot", run, "--output", str(tmp_path / "a.PNG")]) == 0
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert len(panels(figures[0])) == 5


def test_many_runs_have_colours_of_their_own(tmp_path, figures):
    runs = [made(tmp_path / f"run{n}", epochs=1, dynamics=False) for n in range(12)]
    assert cli.main(["plot", *runs, "--output", str(tmp_path / "a.png")]) == 0
    rate = panels(figures[0])["learning rate"]
    assert len({tuple(line.get_color()) for line in rate.lines}) == 12


def test_a_table_of_runs(tmp_path, capsys):
    ended = made(tmp_path / "a", method={"frozen_weight": 0.4})
    other = made(tmp_path / "b", lr=0.5, ended=False)
    plain = made(tmp_path / "c", method="at", twin=False, log={"dynamics": 0})
    evaluate(ended, 400)
    files = ["--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv")]
    assert cli.main(["compare", ended, other, plain, *files]) == 0
    head, rows = table(capsys)
    a, b, c = (dict(zip(head, row, strict=True)) for row in rows)
    assert (a["run"], a["method"], a["network"]) == ("a", "twins-at", "cifar-resnet18-w16")
    assert [row["optimizer.lr"] for row in (a, b, c)] == ["0.01", "0.5", "0.01"]
    assert [row["method.frozen_weight"] for row in (a, b, c)] == ["0.4", "1.0", ""]
    assert not {"method.affine", "log.dynamics", "run.seed", "run.baselines"} & set(head)
    assert [row["epochs"] for row in (a, b, c)] == ["4 of 4", "3 of 4", "4 of 4"]
    assert [row["of images"] for row in (a, b, c)] == ["400 test", "100 test", "400 test"]
    assert a["robust, last"] == "40.0 ± 2.4 %" and a["robust, best"] == "50.0 ± 2.5 %"
    assert b["robust, last"] == "40.0 ± 4.9 %" and b["clean, best"] == "80.0 ± 4.0 %" and b["best epoch"] == "1"
    assert [row["best minus last"] for row in (a, b, c)] == ["+10.0"] * 3 and a["robust gap"] == "+10.0"
    assert [row["seconds"] for row in (a, b, c)] == ["90", "30", "90"]
    assert [row["PGD-100, linf eps 8/255, 400 images"] for row in (a, b, c)] == ["34.5 %", "", ""]
    plain_rows = json.loads((tmp_path / "c.json").read_text())
    assert plain_rows[0]["robust, last"] == 0.4 and "method.frozen_weight" not in plain_rows[2]
    with open(tmp_path / "c.csv", newline="") as file:
        assert [row["optimizer.lr"] for row in csv.DictReader(file)] == ["0.01", "0.5", "0.01"]


def test_evaluations_that_cannot_be_compared_are_not(tmp_path, capsys):
    runs = [made(tmp_path / name, epochs=1, dynamics=False) for name in "abcdef"]
    for run, about in zip(runs, [(400,), (100,), (100, 10, "l2"), (50, 20), (60,), (70,)], strict=True):
        evaluate(run, *about)
    RunFolder(runs[4]).best.unlink()
    RunFolder(runs[5]).evaluated.write_text("[70]")
    assert cli.main(["compare", *runs]) == 0
    head, rows = table(capsys)
    figures = [("linf", 400), ("linf", 100), ("l2", 100)]
    assert head[-3:] == [f"PGD-100, {norm} eps 8/255, {images} images" for norm, images in figures]
    assert [[bool(cell) for cell in row[-3:]] for row in rows[:3]] == torch.eye(3).bool().tolist()
    assert not any(cell for row in rows[3:] for cell in row[-3:])


def test_a_result_that_is_no_object_counts_as_absent(tmp_path):
    run = RunFolder(made(tmp_path / "run", epochs=1))
    assert run.read_result()["step"] == 10
    run.result.write_text("[1]")
    assert run.read_result() == {}


def test_a_run_that_has_just_begun_or_is_being_extended(tmp_path, capsys):
    begun, extended = made(tmp_path / "a", epochs=1, ended=False), made(tmp_path / "b")
    run = RunFolder(extended)
    recipe, _ = run.load_config()
    run.update(recipe.replaced(optimizer={"epochs": 9}), None)
    run.log(kind="train", step=41, epoch=4.1, seconds=50.0, loss=1.0, lr=0.1, accuracy=0.5)
    assert cli.main(["compare", begun, extended]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "| 0 of 1 |" in first and "| 4.1 of 9 | 50 | 100 test |" in second
    assert cli.main(["plot", begun, "--output", str(tmp_path / "a.png")]) == 0


def test_the_end_of_a_run_says_how_far_it_has_overfitted():
    last = {"clean": 0.8, "robust": 0.4, "images": 100}
    same = {"method": "at", "after": last, "best": last | {"epoch": 4, "chosen_on": "test"}, "seconds": 1}
    other = same | {"method": "trades", "best": last | {"robust": 0.45, "epoch": 2, "chosen_on": "test"}}
    tables = [result_table([{"eval_steps": 10, "threads": 2} | r for r in some]) for some in ([same], [same, other])]
    assert "overfitting" not in tables[0]
    assert "Robust overfitting, best minus last in points: trades +5.0. Training" in tables[1]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    run = made(tmp_path / "run", epochs=1)
    (tmp_path / "empty").mkdir()
    for command in ("plot", "compare"):
        assert "name the folder of a run" in refused(capsys, command)
        for name in ("no", "empty"):
            said = refused(capsys, command, run, str(tmp_path / name))
            assert f"'{tmp_path / name}' is not a run folder: it has no config.json" in said
    assert "the name must end in .png or .svg" in refused(capsys, "plot", run, "--output", "a.jpg")
    config = json.loads(RunFolder(run).config.read_text())
    config["recipe"]["colour"] = {}
    RunFolder(run).config.write_text(json.dumps(config))
    said = refused(capsys, "compare", run)
    assert f"'{run}', perhaps of another version: unknown recipe sections: colour" in said
    assert cli.main(["plot", run, "--output", str(tmp_path / "a.png")]) == 0  # needs no recipe


def test_labels_are_as_short_as_they_can_be(tmp_path):
    for name in ("a/run", "b/run", "b/run/at"):
        made(tmp_path / name, epochs=1, ended=False)
    assert list(labelled([str(tmp_path / "a/run")])) == ["run"]
    assert list(labelled([str(tmp_path / "b/run"), str(tmp_path / "b/run/at")])) == ["run", "at"]
    assert list(labelled([str(tmp_path / "a/run"), str(tmp_path / "b/run")])) == ["a/run", "b/run"]
