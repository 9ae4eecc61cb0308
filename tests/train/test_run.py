"""Runs: what they write, that they repeat and resume bit for bit, and what they refuse."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.graph_emulator import Device
from tests.train.helpers import OLD_RECIPE, REGISTER_TINY, TINY, assert_same_run, refused, train
from twins_fast.checkpoints import load_checkpoint, save_checkpoint
from twins_fast.methods import METHODS, TwinsAT
from twins_fast.models import build_model
from twins_fast.ops.backend import use_backend
from twins_fast.train import cli, trainer
from twins_fast.train.run_folder import RunFolder


@pytest.mark.draws
@pytest.mark.parametrize("method", ["at", "twins-at", "twins-trades"])
def test_a_run_writes_everything_and_learns(tmp_path, npz, capsys, method):
    assert train(tmp_path / "run", npz, "--method", method, "--epochs", "4", "--attack.engine", "plan") == 0
    run = RunFolder(tmp_path / "run")
    lines = run.read_metrics()
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["epoch"] for line in lines if line["kind"] == "test"] == [1, 2, 3, 4]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert sum(line["loss"] for line in steps[-3:]) < sum(line["loss"] for line in steps[:3])
    assert ("frozen_accuracy" in steps[0]) == (METHODS[method].wings == 2)
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    result = json.loads(run.result.read_text())
    assert result["after"]["images"] == 12 and ("after_frozen_wing" in result) == (METHODS[method].wings == 2)
    assert method.upper() in capsys.readouterr().out
    names = load_checkpoint(run.best)[0]
    assert any(".main_bn." in name for name in names) == (METHODS[method].wings == 2)


@pytest.mark.parametrize("seconds, pictures", [(0.0, 4), (3600.0, 1)])
def test_the_picture_is_drawn_now_and_then_and_at_the_end(tmp_path, npz, monkeypatch, seconds, pictures):
    drawn = []
    monkeypatch.setattr(trainer, "draw_curves", lambda runs, *_: drawn.append(len(runs["at"])))
    monkeypatch.setattr(trainer, "DRAW_EVERY_SECONDS", seconds)
    assert train(tmp_path / "run", npz, "--method", "at", "--epochs", "3") == 0
    assert len(drawn) == pictures and drawn[-1] == len(RunFolder(tmp_path / "run").read_metrics())


def test_seed_repeats_a_run_and_another_one_differs(tmp_path, npz):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(tmp_path / name, npz, "--seed", seed, "--method", "twins-at") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in "ac")
    assert not torch.equal(a["model.conv1.weight"], c["model.conv1.weight"])


@pytest.mark.parametrize("killed_at", [1, 3, 4])
def test_resuming_continues_the_very_same_trajectory(tmp_path, npz, monkeypatch, killed_at):
    assert train(tmp_path / "whole", npz, "--method", "twins-at") == 0
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    step = trainer.Trainer.train_step

    def interrupted(self, *batch):
        if self.step == killed_at:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    assert train(tmp_path / "cut", npz, "--method", "twins-at") == 130
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_kill_at_any_moment_loses_nothing(tmp_path, npz):
    """A real SIGKILL in the middle of training, several times over, then a resume to the end."""
    program = f"{REGISTER_TINY}; from twins_fast.train import cli, trainer; trainer.SAVE_EVERY_SECONDS = 0.0; "
    arguments = ["train", "--recipe", "mini-pretrain", "--run", str(tmp_path / "cut"), "--data-root", str(npz), *TINY]
    arguments += ["--epochs", "6", "--workers", "0"]
    assert cli.main([*arguments[:4], str(tmp_path / "whole"), *arguments[5:]]) == 0
    run = RunFolder(tmp_path / "cut")
    for attempt, lines_before_kill in enumerate((2, 9)):
        command = arguments if attempt == 0 else ["train", "--resume", str(run.folder)]
        process = subprocess.Popen([sys.executable, "-c", program + f"import sys; sys.exit(cli.main({command!r}))"])
        deadline = time.monotonic() + 240
        while len(run.read_metrics()) < lines_before_kill and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()  # does nothing to a child that has ended and was reaped
        process.wait()
        load_checkpoint(run.last)
    assert cli.main(["train", "--resume", str(run.folder)]) == 0
    assert_same_run(tmp_path / "whole", run.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_says_how_to_resume(tmp_path, npz, number):
    """To the whole group of processes, loaders included, as a terminal and a scheduler send it."""
    assert train(tmp_path / "whole", npz, "--epochs", "3", "--data.workers", "2") == 0
    folder = RunFolder(tmp_path / "cut")
    # A signal in the middle of step 4: sent from inside, so that there is no race.
    program = f"""{REGISTER_TINY}
import os, sys
from twins_fast.train import cli, trainer
step = trainer.Trainer.train_step
def signalled(self, *batch):
    if self.step == 3:
        os.killpg(0, {int(number)})
    return step(self, *batch)
trainer.Trainer.train_step = signalled
sys.exit(cli.main(sys.argv[1:]))
"""
    arguments = ["train", "--recipe", "mini-pretrain", "--run", str(folder.folder), "--data-root", str(npz), *TINY]
    command = [sys.executable, "-c", program, *arguments, "--epochs", "3", "--data.workers", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, start_new_session=True)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.endswith(f"twins-fast: interrupted; twins-fast train --resume {folder.folder} resumes\n")
    assert load_checkpoint(folder.last)[1]["step"] == 4 and folder.read_metrics()[-1]["step"] == 4
    assert cli.main(["train", "--resume", str(folder.folder)]) == 0
    assert_same_run(tmp_path / "whole", folder.folder)


def test_an_interrupted_evaluation_is_made_again(tmp_path, npz, monkeypatch):
    assert train(tmp_path / "whole", npz, "--evaluation.before") == 0
    evaluate = trainer.evaluate
    for evaluations in (0, 1):  # complete ones
        monkeypatch.setattr(trainer, "evaluate", evaluate)
        run, calls = tmp_path / f"cut{evaluations}", iter(range(evaluations))

        def interrupted(*arguments, calls=calls, **options):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(*arguments, **options)

        monkeypatch.setattr(trainer, "evaluate", interrupted)
        assert train(run, npz, "--evaluation.before") == 130
        monkeypatch.setattr(trainer, "evaluate", evaluate)
        assert cli.main(["train", "--resume", str(run)]) == 0
        assert_same_run(tmp_path / "whole", run)


def test_a_second_signal_breaks_a_step_and_saves_nothing(tmp_path, npz, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    forward = TwinsAT.forward

    def twice(self, model, *arguments):
        logits = forward(self, model, *arguments)  # has moved the running statistics
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return logits

    steps = iter(range(2))
    monkeypatch.setattr(TwinsAT, "forward", twice)
    assert train(tmp_path / "cut", npz, "--method", "twins-at") == 130
    monkeypatch.setattr(TwinsAT, "forward", forward)
    assert load_checkpoint(tmp_path / "cut" / "last.safetensors")[1]["step"] == 2
    assert train(tmp_path / "expected", npz, "--method", "twins-at") == 0
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "expected", tmp_path / "cut")


def test_an_interrupt_while_the_best_network_is_written_loses_nothing(tmp_path, npz, monkeypatch):
    assert train(tmp_path / "whole", npz) == 0
    save = trainer.save_checkpoint

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", interrupted)
    assert train(tmp_path / "cut", npz) == 130
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_other_data_than_before_is_refused(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    with np.load(npz) as file:
        arrays = dict(file)
    fewer = {"train": arrays["train"][:20], "train_labels": arrays["train_labels"][:20]}
    np.savez(tmp_path / "fewer.npz", **arrays | fewer)
    np.savez(tmp_path / "renamed.npz", **arrays, classes=["a", "b", "c"])
    resume = ["train", "--resume", str(tmp_path / "run"), "--epochs", "2", "--data-root"]
    assert "its images were 24, now 20" in refused(capsys, *resume, str(tmp_path / "fewer.npz"))
    assert "its classes were ['0', '1', '2'], now ['a'" in refused(capsys, *resume, str(tmp_path / "renamed.npz"))


def test_an_interrupted_end_of_an_extension_is_made_again(tmp_path, npz, monkeypatch):
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    finish = trainer.Trainer._finish

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_finish", interrupted)
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 130
    monkeypatch.setattr(trainer.Trainer, "_finish", finish)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert RunFolder(tmp_path / "run").read_result()["step"] == 6


def test_only_one_process_writes_a_run(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    program = f"""import sys
from twins_fast.train.run_folder import RunFolder
with RunFolder({str(tmp_path / "run")!r}).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"))
    assert "another process is writing into run folder" in said
    other.kill()  # no chance to unlock
    other.wait()
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_finished_run_is_extended(capsys, tmp_path, npz):
    assert train(tmp_path / "whole", npz, "--epochs", "3") == 0
    assert train(tmp_path / "run", npz, "--epochs", "2") == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0  # finished: nothing to do
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0  # the folder knows its new length
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"), "--epochs", "2")
    assert "optimizer.epochs is 3, asked 2" in said
    assert train(tmp_path / "cycle", npz, "--epochs", "1", "--optimizer.schedule", "onecycle") == 0
    said = refused(capsys, "train", "--resume", str(tmp_path / "cycle"), "--epochs", "2")
    assert "the learning rates of 'onecycle' depend on the number of epochs" in said


def test_the_best_network_is_chosen_on_validation_images(tmp_path, npz, capsys):
    options = ["--evaluation.choose-on", "validation", "--evaluation.validation-part", "0.25", "--epochs", "3"]
    assert train(tmp_path / "run", npz, *options) == 0
    table = capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    lines, result, meta = run.read_metrics(), run.read_result(), load_checkpoint(run.best)[1]
    assert {line["kind"] for line in lines} == {"train", "validation"}
    measured = [line for line in lines if line["kind"] == "validation"]
    assert [line["images"] for line in measured] == [6, 6, 6] and result["after"]["images"] == 12
    assert meta["robust"] == max(line["robust"] for line in measured) and meta["chosen_on"] == "validation"
    assert result["best"]["epoch"] == meta["epoch"] and result["best"]["chosen_on"] == "validation"
    assert "12 test images" in table and "the best one under attack on validation images" in table


def test_no_network_is_measured_twice(tmp_path, npz, monkeypatch):
    evaluate, calls = trainer.evaluate, []
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **b: calls.append(1) or evaluate(*a, **b))
    assert train(tmp_path / "run", npz, "--epochs", "1", "--evaluation.choose-on", "validation") == 0
    assert len(calls) == 2  # on validation and on test images: the best network is the last one
    result = RunFolder(tmp_path / "run").read_result()
    assert result["best"]["robust"] == result["after"]["robust"]


def test_two_wings_from_random_weights_must_be_asked_for(capsys, tmp_path, npz):
    run = ["--run", str(tmp_path / "run"), "--data-root", str(npz), "--data.dataset", "npz"]
    said = refused(capsys, "train", "--recipe", "cifar10", *run)
    assert "say --checkpoint FILE, or --checkpoint none for random weights" in said
    assert not (tmp_path / "run").exists()


def test_a_full_disk_names_the_file(tmp_path, npz, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    monkeypatch.setattr(os, "fsync", full)
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"), "--epochs", "2")
    assert f"No space left on device: '{tmp_path / 'run'}/" in said and ".tmp" not in said
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        RunFolder(tmp_path / "run").log(kind="train")


def test_a_resume_needs_the_pretrained_file_no_more(tmp_path, npz, monkeypatch):
    source = tmp_path / "source.safetensors"
    save_checkpoint(source, build_model("tiny", 3).state_dict(), {})
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", npz, "--checkpoint", source.name, "--method", "twins-at") == 0
    source.unlink()
    monkeypatch.chdir("/")
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_lost_files_of_a_run(capsys, tmp_path, npz):
    run = RunFolder(tmp_path / "run")
    assert train(run.folder, npz, "--epochs", "1") == 0
    run.metrics.unlink()
    assert cli.main(["train", "--resume", str(run.folder)]) == 0
    run.config.write_text("[]")
    assert "is not a run folder" in refused(capsys, "train", "--resume", str(run.folder))
    run.config.unlink()
    assert train(run.folder, npz, "--lr", "0.001") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_amp_and_channels_last_are_options_of_every_run(tmp_path, npz):
    options = ["--amp", "bf16", "--network.channels-last", "--method", "twins-trades", "--epochs", "1"]
    assert train(tmp_path / "run", npz, *options) == 0
    losses = [line["loss"] for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "train"]
    assert all(0 < loss < 20 for loss in losses)


def test_a_baseline_runs_another_method_on_the_same_budget(tmp_path, npz, capsys):
    options = ["--method", "twins-at", "--run.baselines", "at,twins-at", "--evaluation.before", "--epochs", "1"]
    assert train(tmp_path / "run", npz, *options) == 0
    table = capsys.readouterr().out
    for row in ("before training", "TWINS-AT | adaptive", "TWINS-AT | frozen", "| AT |"):
        assert row in table
    assert RunFolder(tmp_path / "run" / "at").result.exists()


def test_data_errors_leave_no_run_folder(capsys, tmp_path):
    run = tmp_path / "run"
    place = ["--run", str(run), "--data-root", str(tmp_path / "no")]
    said = refused(capsys, "train", "--recipe", "cub200", "--checkpoint", "none", *place)
    assert "no' is not a folder" in said and not run.exists()
    said = refused(capsys, "train", "--recipe", "mini", "--run", str(run), "--checkpoint", str(tmp_path / "no.ckpt"))
    assert "no.ckpt" in said and not run.exists()


def test_run_folder_that_cannot_be_used_is_refused(capsys, tmp_path, npz):
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert train(tmp_path / "file" / "run", npz) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    assert train(tmp_path / "run", npz) == 2
    assert "already holds a run" in capsys.readouterr().err
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"), "--recipe", "cifar10")
    assert "belongs to another recipe" in said and "network.arch is 'tiny'" in said
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"), "--eps", "4/255")
    assert "belongs to another recipe: attack.eps is" in said
    assert "is not a run folder" in refused(capsys, "train", "--resume", str(tmp_path / "nothing"))


def test_truncated_checkpoint_is_refused_and_kept(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    last = tmp_path / "run" / "last.safetensors"
    cut = last.read_bytes()[:5000]
    last.write_bytes(cut)
    assert "last.safetensors" in refused(capsys, "train", "--resume", str(tmp_path / "run"))
    assert last.read_bytes() == cut


def test_captured_steps_make_the_same_run(capsys, tmp_path, npz, monkeypatch):
    """As on a GPU; a loss that is not finite stops it there, too."""

    def fused(recipe, model):
        options = recipe.optimizer
        return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=options.weight_decay, fused=True)

    monkeypatch.setattr(trainer, "make_optimizer", fused)
    options = ["--method", "twins-at"]
    with use_backend("torch"):
        assert train(tmp_path / "plain", npz, *options) == 0
        device = Device(monkeypatch)
        assert train(tmp_path / "captured", npz, *options) == 0
        assert (device.captures, device.replays) == (1, 5)
        assert_same_run(tmp_path / "plain", tmp_path / "captured")
        assert train(tmp_path / "spoiled", npz, *options, "--lr", "1e30", "--epochs", "3") == 2
        assert device.replays > 5 and "the loss is" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--lr", "1e30", "--epochs", "3") == 2
    assert "the loss is" in capsys.readouterr().err


def test_a_run_folder_of_version_0_1_resumes(tmp_path, npz, monkeypatch):
    """config.json as version 0.1 wrote it for these very runs."""
    options = ["--method", "twins-trades", "--method.adversary", "trades", "--method.beta", "5"]
    options += ["--method.frozen-weight", "0.4", "--run.baselines", "trades", "--attack.engine", "auto"]
    assert train(tmp_path / "whole", npz, *options) == 0
    step = trainer.Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 3 and "trades" not in self.folder.folder.name:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    folder = RunFolder(tmp_path / "old")
    assert train(folder.folder, npz, *options) == 130
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    folder.config.write_text(json.dumps({"recipe": OLD_RECIPE, "data_root": str(npz)}))
    assert cli.main(["train", "--resume", str(folder.folder)]) == 0
    assert_same_run(tmp_path / "whole", folder.folder)
    assert_same_run(tmp_path / "whole" / "trades", folder.folder / "trades")


def test_the_baselines_of_an_old_run_keep_their_own_options(tmp_path, npz):
    """The flat form had options of every method, so that a baseline may have one that the run's method has not."""
    config = OLD_RECIPE | {"method": "twins-at", "adversary": "published"}
    for folder, recipe in ((tmp_path, config), (tmp_path / "trades", config | {"method": "trades", "beside": []})):
        folder.mkdir(exist_ok=True)
        RunFolder(folder).config.write_text(json.dumps({"recipe": recipe, "data_root": str(npz)}))
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    assert load_checkpoint(tmp_path / "trades" / "last.safetensors")[1]["recipe"]["method"] == {
        "name": "trades",
        "adversary": "ce",
        "beta": 5.0,
    }
