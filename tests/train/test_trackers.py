"""TensorBoard and Weights & Biases: stand-ins for both, and the real TensorBoard where it is installed."""

import sys
from types import SimpleNamespace

import pytest

from tests.train.helpers import refused, train
from twins_fast.train import cli, trainer
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.trackers import TrackerError, Trackers, check_trackers, scalars

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


@pytest.fixture
def stand_ins(monkeypatch):
    """What they were asked for, in order; figures that the real W&B would drop are not there."""
    asked, reached = [], {}

    class Writer:
        def __init__(self, log_dir, purge_step):
            asked.append(("begin", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            asked.append((name, value, step))

        def flush(self):
            asked.append(("flush",))

        def close(self):
            asked.append(("end",))

    class Run:
        def __init__(self, name):
            self.name = name
            reached[name] = reached.get(name, -1) + 1

        def define_metric(self, name, step_metric=None):
            asked.append(("axis", (name, step_metric)))

        def log(self, figures, step=None):
            if step is not None and step < reached[self.name]:
                return
            reached[self.name] = reached[self.name] + 1 if step is None else step
            at = figures.get("step", step)
            asked.extend((name, value, at) for name, value in figures.items() if name != "step")

        def finish(self):
            asked.append(("end",))

    def init(**options):
        asked.append(("begin", options))
        if options["project"] == "refused":
            raise RuntimeError("no key")
        return Run(options["id"])

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return asked


@pytest.fixture
def interrupt_at(monkeypatch):
    """Make runs end before a step."""
    step = trainer.Trainer.train_step

    def patch(last):
        def interrupted(self, *batch):
            if self.step == last:
                raise KeyboardInterrupt
            return step(self, *batch)

        monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)

    return patch


def test_a_run_tells_them_all_that_it_logs_and_resumes(stand_ins, tmp_path, npz, monkeypatch, interrupt_at):
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    save = trainer.save_state
    monkeypatch.setattr(trainer, "save_state", lambda *state: stand_ins.append(("saved",)) or save(*state))
    interrupt_at(3)
    assert train(tmp_path / "run", npz, "--log", "tensorboard,wandb", "--log.dynamics", "2") == 130
    interrupt_at(None)
    assert stand_ins[-2:] == [("end",)] * 2
    first, stand_ins[:] = list(stand_ins), []
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    folder, run = tmp_path / "run", RunFolder(tmp_path / "run")
    assert [entry[1:] for entry in (first[0], stand_ins[0])] == [(str(folder / "tensorboard"), n) for n in (0, 4)]
    (_, before), (_, after) = first[1], stand_ins[1]
    assert before == after and before["resume"] == "allow" and before["name"] == f"{tmp_path.name}/run"
    assert before["config"]["log"]["to"] == ["tensorboard", "wandb"] and before["project"] == "twins-fast"
    told = [entry for entry in first + stand_ins if len(entry) == 3 and entry[0] != "begin"]
    expected = [(name, value, line["step"]) for line in run.read_metrics() for name, value in scalars(line)]
    assert sorted(told) == sorted(2 * expected)
    assert {name.split("/")[0] for name, *_ in told} == {"train", "dynamics", "test"}
    told_before_saved = [first[n - 1] for n, entry in enumerate(first) if entry == ("saved",)]
    assert len(told_before_saved) > 3 and set(told_before_saved) == {("flush",)}


@pytest.mark.parametrize(("evaluates", "purged"), [("--evaluation.no-before", 0), ("--evaluation.before", 1)])
def test_a_run_that_ended_before_its_first_step(stand_ins, tmp_path, npz, monkeypatch, interrupt_at, evaluates, purged):
    """With an evaluation, which is not made again, there is a checkpoint of step 0."""
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    interrupt_at(0)
    assert train(tmp_path / "run", npz, "--log", "tensorboard,wandb", evaluates) == 130
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 130
    begun = [entry for entry in stand_ins if entry[0] == "begin"]
    assert [entry[2] for entry in begun[::2]] == [0, purged]
    assert len({entry[1]["id"] for entry in begun[1::2]}) == 2 - purged


def test_figures_of_steps_that_are_made_again_are_kept(stand_ins, tmp_path):
    with Trackers(("wandb",), tmp_path, {}, -1) as tracker:
        tracker.log(LINE)
        tracker.log(LINE | {"step": 8})
    with Trackers(("wandb",), tmp_path, {}, 4) as tracker:
        tracker.log(LINE | {"step": 6})
    assert [entry[2] for entry in stand_ins if entry[0] == "dynamics/weight_norm"] == [4, 8, 6]
    assert stand_ins.count(("axis", ("*", "step"))) == 2


def test_what_is_missing_is_named_before_a_folder_is_made(capsys, tmp_path, npz, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    capsys.readouterr()
    assert train(tmp_path / "run", npz, "--log", "wandb") == 2
    said = capsys.readouterr().err
    assert said.startswith("twins-fast: error: --log wandb needs the package wandb (") and said.count("\n") == 1
    assert said.endswith("): pip install 'twins-fast[wandb]'\n")
    assert not (tmp_path / "run").exists()
    assert "unknown tracker 'mlflow'; choose from tensorboard, wandb" in refused(
        capsys, "train", "--recipe", "mini", "--log", "mlflow"
    )
    assert "to must name each tracker once" in refused(capsys, "train", "--recipe", "mini", "--log", "wandb,wandb")


@pytest.mark.parametrize("broken", ["", "raise ImportError('no such library\\nfor you')", "import os; os.nothing"])
def test_a_broken_installation_is_one_line(tmp_path, monkeypatch, broken):
    """W&B itself makes a folder of its name where it runs, which Python takes for a package."""
    (tmp_path / "wandb").mkdir()
    if broken:
        (tmp_path / "wandb" / "__init__.py").write_text(broken)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    reason = "no such library" if "library" in broken else "has no attribute"
    with pytest.raises(TrackerError, match=rf"^--log wandb needs the package wandb \([^\n]*{reason}[^\n]*$"):
        check_trackers(["wandb"])
    sys.modules.pop("wandb", None)


def test_a_tracker_that_refuses_is_one_line(stand_ins, capsys, tmp_path, npz, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    capsys.readouterr()
    assert train(tmp_path / "run", npz, "--log", "tensorboard,wandb") == 2
    assert capsys.readouterr().err == "twins-fast: error: --log wandb: no key\n"
    assert stand_ins[-1] == ("end",)  # of the other one


def test_nothing_is_imported_unasked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Trackers((), tmp_path, {}, -1) as none:
        none.log(LINE)


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(("tensorboard",), tmp_path, {}, -1) as tracker:  # ended before its first checkpoint
        tracker.log(LINE | {"step": 0, "weight_norm": 9.0})
    with Trackers(("tensorboard",), tmp_path, {}, -1) as tracker:
        tracker.log(LINE)
        tracker.log(LINE | {"step": 8, "weight_norm": 7.0})
    with Trackers(("tensorboard",), tmp_path, {}, 4) as tracker:  # resumed after step 4
        tracker.log(LINE | {"step": 6, "weight_norm": 5.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("dynamics/weight_norm")] == [(4, 2.0), (6, 5.0)]
