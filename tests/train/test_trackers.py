"""TensorBoard and Weights & Biases: stand-ins for both, and the real TensorBoard where it is installed."""

import importlib.machinery
import sys
import types

import pytest

from tests.train.helpers import refused, train
from twins_fast.train import cli, trackers, trainer
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.trackers import Trackers, scalars

LINE = {"kind": "dynamics", "step": 4, "epoch": 0.5, "weight_norm": 2.0, "weight_norms": [1.0, 3.0]}
LINE |= {"layers": ["a", "b"], "effective_lrs": [0.1, None], "wings": ["n"], "mean_shift": 0.5, "mean_shifts": [0.25]}


def test_a_line_as_names_and_numbers():
    assert dict(scalars(LINE)) == {
        "dynamics/epoch": 0.5,
        "dynamics/weight_norm": 2.0,
        "dynamics/weight_norms/a": 1.0,
        "dynamics/weight_norms/b": 3.0,
        "dynamics/effective_lrs/a": 0.1,
        "dynamics/mean_shift": 0.5,
        "dynamics/mean_shifts/n": 0.25,
    }


def module(name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    return made


@pytest.fixture
def stand_ins(monkeypatch):
    """What they were asked for, in order."""
    asked = []

    class Writer:
        def __init__(self, log_dir, purge_step):
            asked.append(("begin", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            asked.append((name, value, step))

        def close(self):
            asked.append(("end",))

    class Run:
        def log(self, figures, step):
            asked.extend((name, value, step) for name, value in figures.items())

        def finish(self):
            asked.append(("end",))

    def init(**options):
        asked.append(("begin", options))
        if options["project"] == "refused":
            raise RuntimeError("no key")
        return Run()

    monkeypatch.setitem(sys.modules, "tensorboard", module("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module("torch.utils.tensorboard", SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init, Error=RuntimeError))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return asked


def test_a_run_tells_them_all_that_it_logs_and_resumes(stand_ins, tmp_path, npz, monkeypatch):
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    step = trainer.Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "train_step", interrupted)
        assert train(tmp_path / "run", npz, "--log", "tensorboard,wandb", "--log.dynamics", "2") == 130
    assert stand_ins[-2:] == [("end",)] * 2
    first, stand_ins[:] = list(stand_ins), []
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    folder, run = tmp_path / "run", RunFolder(tmp_path / "run")
    assert [entry[1:] for entry in (first[0], stand_ins[0])] == [(str(folder / "tensorboard"), n) for n in (None, 4)]
    (_, before), (_, after) = first[1], stand_ins[1]
    assert before == after and before["resume"] == "allow" and before["name"] == "run"
    assert before["config"]["log"]["to"] == ["tensorboard", "wandb"] and before["project"] == "twins-fast"
    told = [entry for entry in first + stand_ins if len(entry) == 3 and entry[0] != "begin"]
    expected = [(name, value, line["step"]) for line in run.read_metrics() for name, value in scalars(line)]
    assert sorted(told) == sorted(2 * expected)
    assert {name.split("/")[0] for name, *_ in told} == {"train", "dynamics", "test"}


def test_what_is_missing_is_named_before_a_folder_is_made(capsys, tmp_path, npz, monkeypatch):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    capsys.readouterr()
    assert train(tmp_path / "run", npz, "--log", "wandb") == 2
    said = capsys.readouterr().err
    assert said == "twins-fast: error: --log wandb needs the package wandb: pip install 'twins-fast[wandb]'\n"
    assert not (tmp_path / "run").exists()
    assert "unknown tracker 'mlflow'; choose from tensorboard, wandb" in refused(
        capsys, "train", "--recipe", "mini", "--log", "mlflow"
    )
    assert "to must name each tracker once" in refused(capsys, "train", "--recipe", "mini", "--log", "wandb,wandb")


def test_a_tracker_that_refuses_is_one_line(stand_ins, capsys, tmp_path, npz, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    capsys.readouterr()
    assert train(tmp_path / "run", npz, "--log", "tensorboard,wandb") == 2
    assert capsys.readouterr().err == "twins-fast: error: --log wandb: no key\n"
    assert stand_ins[-1] == ("end",)  # of the other one


def test_nothing_is_imported_unasked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Trackers((), tmp_path, {}, 0) as none:
        none.log(LINE)


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(("tensorboard",), tmp_path, {}, 0) as tracker:
        tracker.log(LINE)
        tracker.log(LINE | {"step": 8, "weight_norm": 7.0})
    with Trackers(("tensorboard",), tmp_path, {}, 4) as tracker:  # resumed after step 4
        tracker.log(LINE | {"step": 6, "weight_norm": 5.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("dynamics/weight_norm")] == [(4, 2.0), (6, 5.0)]
