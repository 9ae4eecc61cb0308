"""The command line: its commands, and what it refuses in one line."""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.train.helpers import refused, train
from twins_fast.checkpoints import load_checkpoint
from twins_fast.train import cli, commands
from twins_fast.train.config_file import read_recipe
from twins_fast.train.recipes import RECIPES
from twins_fast.train.run_folder import RunFolder
from twins_fast.verdicts import Verdict


def test_names_are_checked(capsys):
    assert "unknown recipe 'cifar11'" in refused(capsys, "train", "--recipe", "cifar11")
    assert "unknown method 'fat'" in refused(capsys, "train", "--recipe", "mini", "--method", "fat")
    assert "unknown arch 'resnet51'" in refused(capsys, "train", "--recipe", "mini", "--arch", "resnet51")
    assert "--recipe or --config is needed" in refused(capsys, "train")
    assert "Unrecognized options: --lrate" in refused(capsys, "train", "--recipe", "mini", "--lrate", "1")
    assert "unknown command 'trian'; choose from train, sweep, eval" in refused(capsys, "trian")


def test_values_are_checked(capsys):
    for words, message in (
        ("--eps -1", "eps must be a finite number >= 0, got -1"),
        ("--eps 8", "eps must be at most 1, as images are in [0, 1], got 8; did you mean 8/255?"),
        ("--eps 8/x", "'8/x' is not a number or fraction"),
        ("--steps 2.5", "Error parsing --steps/--attack.steps: invalid literal for int() with base 10: '2.5'"),
        ("--amp fp8", "invalid choice 'fp8' for argument '--amp/--run.amp'"),
        ("--network.upsample 0", "upsample must be at least 1, got 0"),
        ("--run.baselines trades,trades", "baselines must name each method once, got trades, trades"),
        ("--method at --method.beta 3", "Unrecognized options: --method.beta"),
        ("--config x.toml", "--recipe and --config exclude each other"),
        ("--resume a --run b", "--run and --resume exclude each other"),
    ):
        assert message in refused(capsys, "train", "--recipe", "mini", *words.split())


def test_a_network_that_cannot_upsample_is_refused_before_a_folder_is_made(capsys, tmp_path):
    run = ["--run", str(tmp_path / "run"), "--checkpoint", "none"]
    said = refused(capsys, "train", "--recipe", "mini", "--network.upsample", "64", *run)
    assert "upsample must be none" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(capsys, tmp_path, device):
    arguments = ["train", "--recipe", "mini", "--run", str(tmp_path / "run"), "--device", device]
    assert f"no device '{device}' here" in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_help_has_a_sentence_for_every_field(capsys):
    assert cli.main(["train", "--method", "twins-trades", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "--eps N/255, --attack.eps N/255 Radius of the ball. (default: 8/255)",
        "--amp {none,bf16,fp16}, --run.amp {none,bf16,fp16} Half-precision dtype of autocast. (default: none)",
        "--method.beta FLOAT Weight of the KL term. (default: 6.0)",
        "--data.dataset {aircraft,caltech101,",
    ):
        assert words in text


def test_a_reader_that_stops_reading_is_no_error():
    command = [sys.executable, "-m", "twins_fast", "recipes", "mini"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


def test_what_only_prints_a_text_does_not_wait_for_pytorch(capsys):
    for arguments in ([], ["--help"], ["--version"]):
        program = (
            f"import sys; from twins_fast.train import cli; cli.main({arguments}); sys.exit('torch' in sys.modules)"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert all(command in said.stdout for command in cli.COMMANDS) or said.stdout.startswith("twins-fast 0.")


def test_recipes_are_printed_as_files_that_config_reads(capsys, tmp_path, npz):
    assert cli.main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)
    assert cli.main(["recipes", "mini-pretrain"]) == 0
    path = tmp_path / "own.toml"
    path.write_text(capsys.readouterr().out.replace('"mini-pretrain"', '"own"'))
    assert cli.main(["recipes", "cifar11"]) == 2

    own = read_recipe(path)
    assert own.name == "own" and own.optimizer == RECIPES["mini-pretrain"].optimizer
    short = ["--arch", "tiny", "--epochs", "1", "--batch-size", "8", "--steps", "1", "--evaluation.steps", "1"]
    run = ["--run", str(tmp_path / "run"), "--data-root", str(npz), "--data.classes", ""]
    assert cli.main(["train", "--config", str(path), *short, *run]) == 0
    recipe, _ = RunFolder(tmp_path / "run").load_config()
    assert recipe.name == "own" and recipe.optimizer.schedule == "onecycle" and recipe.optimizer.epochs == 1


def test_eval_reads_what_a_run_wrote(tmp_path, npz, capsys):
    train(tmp_path / "run", npz, "--method", "twins-at", "--run.baselines", "at")
    result = json.loads(RunFolder(tmp_path / "run").result.read_text())
    capsys.readouterr()
    for wing, key in (("adaptive", "after"), ("frozen", "after_frozen_wing")):
        checkpoint = str(tmp_path / "run" / "last.safetensors")
        assert cli.main(["eval", checkpoint, "--wing", wing, "--json", str(tmp_path / "eval.json")]) == 0
        said = capsys.readouterr().out
        assert "| 12 images, linf | clean | PGD-2 |" in said and "| eps 8/255 | " in said
        measured = json.loads((tmp_path / "eval.json").read_text())
        assert measured["wing"] == wing and measured["dataset"] == "npz" and measured["alpha"] == 2 / 255
        clean, attacked = measured["results"]
        assert (clean["attack"], attacked["attack"], attacked["eps"]) == ("clean", "pgd2", 8 / 255)
        assert (clean["accuracy"], attacked["accuracy"]) == (result[key]["clean"], result[key]["robust"])
    assert cli.main(["eval", str(tmp_path / "run"), "--eps", "0", "--images", "5"]) == 0  # the best network
    clean, robust = re.findall(r"[\d.]+ ± [\d.]+ %", capsys.readouterr().out)
    assert clean == robust
    found = RunFolder(tmp_path / "run").read_evaluation()  # of the best network, not of the last one above
    assert found["results"][1]["eps"] == 0 and found["images"] == 5
    assert cli.main(["eval", str(tmp_path / "run" / "at" / "best.safetensors"), "--data-root", str(npz)]) == 0


def test_eval_with_everything(tmp_path, npz, capsys, monkeypatch):
    train(tmp_path / "run", npz, "--method", "at", "--epochs", "1")
    capsys.readouterr()
    words = "--n 9 --attacks clean,pgd2,pgd2x2,autoattack:apgd-ce2+square3 --eps 4/255,16/255 --per-class".split()
    files = {flag: str(tmp_path / f"e.{flag}") for flag in ("json", "csv")} | {"picture": str(tmp_path / "e.png")}
    files |= {"transfer": str(tmp_path / "run" / "last.safetensors"), "save-images": str(tmp_path / "e.npz")}
    words += [word for flag, file in files.items() for word in (f"--{flag}", file)]
    said = []
    for _ in range(2):
        assert cli.main(["eval", str(tmp_path / "run"), *words]) == 0
        said.append(capsys.readouterr().out)
        assert not (tmp_path / "e.npz.parts").exists()
    assert said[0] == said[1]
    titles = "clean | PGD-2 | PGD-2, 2 restarts | AutoAttack (APGD-CE-2 + Square-3) | PGD-2 of another network | all |"
    assert f"| 9 images, linf | {titles}" in said[0] and f"| eps 16/255 | images | {titles}" in said[0]
    assert len(json.loads((tmp_path / "e.json").read_text())["results"]) == 2 * 6
    assert (tmp_path / "e.csv").read_text().count("\n") == 1 + 2 * 6 * 4
    for name in ("e.png", "e-changes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "e.npz") as file:
        assert file["clean"].shape == file["autoattack:apgd-ce2+square3-eps0.0627451"].shape == (9, 3, 32, 32)

    def cut(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "robust_accuracy", cut)
    assert cli.main(["eval", str(tmp_path / "run")]) == 130
    assert f"the same command goes on, by {RunFolder(tmp_path / 'run').evaluation}" in capsys.readouterr().err


def test_eval_on_a_full_disk_loses_nothing(tmp_path, npz, capsys, monkeypatch):
    train(tmp_path / "run", npz, "--method", "at", "--epochs", "1")
    capsys.readouterr()
    own = ["eval", str(tmp_path / "run"), "--attacks", "clean,pgd2,pgd3"]
    assert cli.main(own) == 0
    whole = capsys.readouterr().out
    record = RunFolder(tmp_path / "run").evaluation
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:2]))

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("twins_fast.evaluation.record.os.fsync", full)
        assert "No space left on device: " in refused(capsys, *own)
    assert record.read_bytes().startswith(b"".join(lines[:2]))
    assert cli.main(own) == 0 and capsys.readouterr().out == whole


def test_eval_of_what_does_not_fit(capsys, tmp_path, npz):
    assert "RUN|FILE|embedded" in refused(capsys, "eval")
    assert "knows the classes airplane" in refused(capsys, "eval", "embedded", "--recipe", "mini")
    # The network that comes with the package holds its recipe.
    assert "dataset 'npz' needs a data root (--data-root)" in refused(capsys, "eval", "embedded")
    (tmp_path / "config.json").write_text("{}")  # somebody else's
    torch.save({"a": torch.ones(2)}, tmp_path / "b.pt")
    said = refused(capsys, "eval", str(tmp_path / "b.pt"), "--recipe", "mini-pretrain")
    assert "needs a data root (--data-root)" in said
    assert "not a checkpoint" in refused(capsys, "eval", str(npz), "--recipe", "mini")
    assert "holds no best.safetensors" in refused(capsys, "eval", str(tmp_path))
    assert "no.ckpt" in refused(capsys, "eval", str(tmp_path / "no.ckpt"))
    train(tmp_path / "run", npz, "--method", "at", "--epochs", "1")
    own = ["eval", str(tmp_path / "run")]
    assert "has no two-wing layers" in refused(capsys, *own, "--wing", "frozen")
    assert "needs an .npz file" in refused(capsys, *own, "--data-root", str(tmp_path))
    assert "did you mean 8/255?" in refused(capsys, *own, "--eps", "4/255,8")
    assert "unknown attack 'fgsm'; choose from clean, pgd10" in refused(capsys, *own, "--attacks", "clean,fgsm")
    assert "write pgd50 there" in refused(capsys, *own, "--attacks", "clean", "--steps", "50")
    assert "APGD-T needs at least 4 classes, the network has 3" in refused(capsys, *own, "--attacks", "autoattack")
    state, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    four = {**state, "fc_downstream.weight": torch.ones(4, 32), "fc_downstream.bias": torch.ones(4)}
    torch.save(four, tmp_path / "four.pt")
    said = refused(capsys, "eval", str(tmp_path / "four.pt"), "--recipe", "mini-pretrain", "--data-root", str(npz))
    assert "the data set has no class airplane" in said
    recipe = tmp_path / "own.toml"
    assert cli.main(["recipes", "mini-pretrain"]) == 0
    recipe.write_text(re.sub(r"classes = .*", "classes = []", capsys.readouterr().out))
    said = refused(capsys, "eval", str(tmp_path / "four.pt"), "--config", str(recipe), "--data-root", str(npz))
    assert "four.pt is a network of 4 classes; the data has 3" in said
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert "does not say how it was made" in refused(capsys, "eval", str(tmp_path / "a.pt"))


def test_convert_checkpoint_and_info(capsys, tmp_path):
    torch.save({"state_dict": {"module.model.conv1.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert cli.main(["convert-checkpoint", str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "b.safetensors")[0].keys() == {"conv1.weight"}
    assert cli.main(["info"]) == 0
    assert "twin_batch_norm on cpu:" in capsys.readouterr().out


class TestQualify:
    """Before a network is trained or evaluated on a GPU; the device itself is never asked here."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        monkeypatch.setattr(commands, "_check_device", lambda name: None)
        monkeypatch.setattr(commands, "qualify", lambda *arguments, **options: calls.append((arguments, options)) or {})
        monkeypatch.setattr(commands, "run_with_baselines", lambda *_, **__: [])
        monkeypatch.setattr(commands, "result_table", lambda results: "")
        return calls

    @pytest.mark.parametrize(
        ("words", "expected"),
        [("--device cuda:0", [(("cuda:0",), {})]), ("--device cuda --no-qualify", []), ("--device cpu", [])],
    )
    def test_train_does_it_first(self, calls, words, expected, tmp_path):
        assert cli.main(["train", "--recipe", "mini", "--run", str(tmp_path / "run"), *words.split()]) == 0
        assert calls == expected

    @pytest.mark.parametrize(("words", "times"), [("--device cuda", 1), ("--device cuda --no-qualify", 0)])
    def test_eval_does_it_first(self, calls, words, times, capsys):
        refused(capsys, "eval", "no-such-file", *words.split())
        assert len(calls) == times

    def test_whatever_becomes_of_it_the_command_goes_on(self, calls, monkeypatch, tmp_path, capsys):
        def fails(device):
            raise ValueError("the driver is too old")

        monkeypatch.setattr(commands, "qualify", fails)
        assert cli.main(["train", "--recipe", "mini", "--run", str(tmp_path / "run"), "--device", "cuda"]) == 0
        said = "the device could not be checked, so that plain PyTorch runs: the driver is too old"
        assert said in capsys.readouterr().out

    def test_the_command(self, calls, monkeypatch, capsys):
        found = {"plan bfloat16": Verdict("slower", "1.01 times the speed of plain PyTorch")}
        monkeypatch.setattr(
            commands, "qualify", lambda *arguments, **options: calls.append((arguments, options)) or found
        )
        assert cli.main(["qualify", "--again"]) == 0 and calls == [(("cuda",), {"again": True})]
        assert "plan bfloat16: slower 1.01 times" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
    def test_without_a_gpu(self, capsys):
        assert "no device 'cuda' here" in refused(capsys, "qualify")
        assert "cpu is no CUDA device that PyTorch can use" in refused(capsys, "qualify", "--device", "cpu")
