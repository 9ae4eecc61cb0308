"""The results table: its commands, its statistics, and what it makes of results."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench import sources, transfer
from twins_fast.train import cli
from twins_fast.train.settings import axis_of, settings_of


@pytest.mark.parametrize("t, freedom, p", [(2.776, 4, 0.05), (4.303, 2, 0.05), (12.706, 1, 0.05), (0, 3, 1.0)])
def test_students_distribution(t, freedom, p):
    assert transfer.two_sided(t, freedom) == pytest.approx(p, rel=1e-3)


def test_paired_differences():
    mean, error, p = transfer.paired([0.01, 0.02, 0.03])
    assert (mean, error) == (pytest.approx(0.02), pytest.approx(0.01 / 3**0.5)) and 0.07 < p < 0.08
    assert transfer.paired([0.0, 0.0]) == (0, 0, 1) and transfer.paired([0.5, 0.5])[2] == 0


def test_every_method_has_the_same_number_of_draws_with_the_same_rates():
    rates = set()
    for row in transfer.ROWS:
        words = transfer.command(row, Path("data.npz"), Path("cifar10.npz"))
        parsed = cli._parse(words)
        assert parsed.fields.method.name == row.method and parsed.fields.optimizer.epochs == transfer.EPOCHS
        axes = [axis_of(text) for text in (*transfer.RATES, *([row.axis] if row.axis else []))]
        drawn = settings_of(parsed.fields, axes, transfer.DRAWS)
        assert len(drawn) == transfer.DRAWS and all(len(setting) == len(axes) for setting in drawn)
        rates.add(tuple(setting["optimizer.lr"] for setting in drawn))
    assert len(rates) == 1
    (twins,) = (row for row in transfer.ROWS if row.name == transfer.ABLATED)
    recipe = cli._parse(transfer.command(twins, Path("data.npz"), Path("cifar10.npz"))).fields
    for changed in transfer.ABLATIONS:
        assert settings_of(recipe, [axis_of(text) for text in changed])
    assert {name for pair in transfer.PAIRS for name in pair} <= {row.name for row in transfer.ROWS}


def test_a_subset_has_as_many_images_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "FOLDER", tmp_path / "runs")
    labels = np.arange(100) % 10
    images = np.zeros((100, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "all.npz", train=images, train_labels=labels, test=images, test_labels=labels)
    with np.load(transfer.subset(tmp_path / "all.npz", 3)) as found:
        assert np.bincount(found["train_labels"]).tolist() == [3] * 10 and len(found["test"]) == 100
    with np.load(sources.shrunk(tmp_path / "all.npz")) as found:
        assert found["train"].shape == (100, 32, 32, 3) and found["train"].dtype == np.uint8


def test_the_tables(tmp_path):
    titles = ("clean, best", "robust, best", "clean, last", "robust, last", "best minus last")

    def row(shift):
        figures = {title: [0.5 + shift, 0.6 + shift, 0.7 + shift] for title in titles}
        return {
            "figures": figures,
            "seeds": [0, 1, 2],
            "setting": {"optimizer.lr": 0.01},
            "autoattack": {"AutoAttack": 0.3},
            "origin": ["one machine", "abc", "bf16"],
        }

    ablations = [{"changed": {"method.affine": "shared"}, **row(0.1)}]
    ablations += [{"changed": {"method.frozen_weight": weight}, **row(0.1 * weight)} for weight in (0, 0.5, 1)]
    failed = {"changed": {"method.frozen_weight": 2}, "seeds": [], "figures": {}}  # all of them
    ablations.append(failed | {"origin": ["one machine", "abc", "bf16"]})
    slow = {"setting": {"optimizer.lr": 0.001}, "seeds": [0, 1, 2], "figures": row(-0.1)["figures"]}
    rows = {"at": row(0) | {"published rates": slow}, "twins-at": row(0.02) | {"ablations": ablations}}
    record = {"size": 2500, "attacked": 1000, "rows": rows}
    assert "| as chosen | 3 | 62.0 ± 10.0 % |" in transfer.ablations_table(record)
    assert transfer.origins(record) == "Rows: at, twins-at, ablations on one machine, commit abc, bf16."
    assert "| affine=shared | 3 | 70.0 ± 10.0 % |" in transfer.ablations_table(record)
    assert "| frozen_weight=2 | 0 |  |" in transfer.ablations_table(record)
    assert "| 2,500 images a class | seeds | clean, best | PGD-10, best |" in transfer.table(record)
    assert "| at | 3 | 60.0 ± 10.0 % |" in transfer.table(record) and "30.0 % | lr=0.01 |" in transfer.table(record)
    assert "| at | 3 | 60.0 ± 10.0 % | 60.0 ± 10.0 % | 30.0 % |" in transfer.table(record, brief=True)
    assert "| at, lr up to 0.01 | 3 | 50.0 ± 10.0 % | 50.0 ± 10.0 % |  |" in transfer.table(record, brief=True)
    transfer.draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| twins-at - at | +2.00 ± 0.00, p = 0.00 |" in transfer.pairs_table(record)
    assert "0.01" not in transfer.pairs_table(record)
    ablations.insert(0, {"changed": {}, **row(0.2), "origin": ["another", "def", "none"]})
    assert transfer.ablations_table(record).count("as chosen") == 1
    assert "| as chosen | 3 | 80.0 ± 10.0 % |" in transfer.ablations_table(record)
    assert transfer.origins(record).endswith("; ablations on another, commit def, float32.")
    rows["twins-at"]["published rates"] = slow
    assert "| twins-at, lr up to 0.01 - at, lr up to 0.01 | +0.00 ±" in transfer.pairs_table(record)


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_fails_leaves_a_gap_and_other_failures_end_it(tmp_path, monkeypatch, written):
    monkeypatch.setattr(transfer, "FOLDER", tmp_path)
    row = transfer.ROWS[0]
    failed = {"settings": [{"setting": {}, "seeds": [0], "figures": {}}], "failures": {"seed=1": "the loss is NaN"}}
    folder = tmp_path / "500" / transfer.AMP / row.slug / "seeds"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text("of an earlier time")

    def run(words):
        if written:
            (folder / "sweep.json").write_text(json.dumps(failed))
        raise subprocess.CalledProcessError(2, words)

    monkeypatch.setattr(transfer, "run", run)
    if written:
        assert transfer.swept(row, 500, tmp_path, tmp_path, "seeds", []) == (folder, failed)
    with pytest.raises(SystemExit if written else subprocess.CalledProcessError, match="NaN" if written else None):
        transfer.trained(row, 500, tmp_path, tmp_path, {})


def test_the_setting_with_a_published_rate():
    def one(rate, robust):
        return {"setting": {"optimizer.lr": rate}, "seeds": [0], "figures": {"validation robust": [robust]}}

    failed = {"setting": {"optimizer.lr": 0.001}, "seeds": [], "figures": {}}
    search = {"settings": [one(0.02, 0.9), one(0.01, 0.7), failed, one(0.003, 0.8)]}
    assert transfer.published(search) == {"optimizer.lr": 0.003}


@pytest.mark.parametrize("same", [True, False])
def test_each_ablation_is_kept_when_it_is_done(same, tmp_path, monkeypatch):
    path = tmp_path / "transfer-500.json"
    origin = ["a machine", "abc", transfer.AMP if same else "another"]
    row = {"setting": {"optimizer.lr": 0.01}, "autoattack": {}, "origin": origin}
    path.write_text(json.dumps({"rows": {"twins-at": row}}))
    fields = [transfer.fields_of(axes) for axes in transfer.ABLATIONS[same:]]
    names = ["-".join(["ablation", *(field.rpartition(".")[2] for field in changed)]) for changed in fields]
    done, again = [], False

    def swept(row, size, data, source, name, words):
        if len(done) == 2 and not again:
            raise KeyboardInterrupt
        done.append(name)
        setting = dict.fromkeys(fields[names.index(name)], 1)
        return tmp_path, {"settings": [{"setting": setting, "seeds": [0], "figures": {}}]}

    monkeypatch.setattr(transfer, "RESULTS", tmp_path)
    monkeypatch.setattr(transfer, "subset", lambda source, size: source)
    monkeypatch.setattr(transfer, "swept", swept)
    monkeypatch.setattr(transfer, "draw", lambda record, path: None)
    with pytest.raises(KeyboardInterrupt):
        transfer.measure(500, tmp_path, [transfer.ABLATIONS_KEY], resume=True)
    assert len(json.loads(path.read_text())["rows"]["twins-at"][transfer.ABLATIONS_KEY]) == 2
    again = True
    transfer.measure(500, tmp_path, [transfer.ABLATIONS_KEY], resume=True)
    assert done == names
    kept = json.loads(path.read_text())["rows"]["twins-at"][transfer.ABLATIONS_KEY]
    assert [[*one["changed"]] for one in kept] == fields and {one["origin"][2] for one in kept} == {transfer.AMP}
