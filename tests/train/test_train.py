"""The trainer and the command line: whole runs of a tiny network."""

import json
import subprocess
import sys
import time

import numpy
import pytest
import torch
import torchvision

from twins_fast.checkpoints import load_checkpoint, save_checkpoint
from twins_fast.methods import METHODS
from twins_fast.models import ARCHITECTURES, CifarResNet
from twins_fast.train import cli, trainer
from twins_fast.train.recipes import RECIPES, Recipe, RecipeError, get_recipe
from twins_fast.train.run import Run

# Runs in a subprocess too, where monkeypatch does not reach. Width 8: with fewer channels oneDNN 3.13 corrupts the heap
# in the channels-last backward pass of a strided 1x1 convolution on AVX2.
REGISTER_TINY = (
    "from twins_fast.models import ARCHITECTURES, CifarResNet; from functools import partial; "
    "ARCHITECTURES['tiny'] = partial(CifarResNet, width=8, blocks=(1, 1))"
)
exec(REGISTER_TINY)

TINY = ["--arch", "tiny", "--epochs", "2", "--batch-size", "8", "--steps", "2", "--eval-steps", "2", "--lr", "0.05"]
TINY += ["--classes", "", "--schedule", "multistep", "--milestones", "1", "--eval-images", "0"]


def train(run, npz, *more):
    return cli.main(["train", "--recipe", "mini-pretrain", "--run", str(run), "--data-root", str(npz), *TINY, *more])


def assert_same_run(left, right):
    """Bit-equal checkpoints and metrics, times apart."""
    for name in ("last.safetensors", "best.safetensors"):
        (a, meta_a), (b, meta_b) = load_checkpoint(left / name), load_checkpoint(right / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        meta_a.pop("seconds", None), meta_b.pop("seconds", None)
        assert meta_a == meta_b

    def lines(folder):
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in Run(folder).read_metrics()]

    assert lines(left) == lines(right)


@pytest.mark.parametrize("method", ["at", "twins-at", "twins-trades"])
def test_a_run_writes_everything_and_learns(tmp_path, npz, capsys, method):
    assert train(tmp_path / "run", npz, "--method", method, "--epochs", "4") == 0
    run = Run(tmp_path / "run")
    lines = run.read_metrics()
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["epoch"] for line in lines if line["kind"] == "test"] == [1, 2, 3, 4]
    assert sum(line["loss"] for line in steps[-3:]) < sum(line["loss"] for line in steps[:3])
    assert ("frozen_accuracy" in steps[0]) == (METHODS[method].wings == 2)
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    result = json.loads(run.result.read_text())
    assert result["test_images"] == 12 and ("after_frozen_wing" in result) == (METHODS[method].wings == 2)
    assert method.upper() in capsys.readouterr().out
    names = load_checkpoint(run.best)[0]
    assert any(".main_bn." in name for name in names) == (METHODS[method].wings == 2)


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

    def interrupted(self, images, labels):
        if self.step == killed_at:
            raise KeyboardInterrupt
        return step(self, images, labels)

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
    run = Run(tmp_path / "cut")
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


def test_a_resume_needs_the_pretrained_file_no_more(tmp_path, npz, monkeypatch):
    source = tmp_path / "source.safetensors"
    save_checkpoint(source, ARCHITECTURES["tiny"](num_classes=3).state_dict(), {})
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", npz, "--checkpoint", source.name, "--method", "twins-at") == 0
    source.unlink()
    monkeypatch.chdir("/")
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_lost_files_of_a_run(capsys, tmp_path, npz):
    run = Run(tmp_path / "run")
    assert train(run.folder, npz, "--epochs", "1") == 0
    run.metrics.unlink()
    assert cli.main(["train", "--resume", str(run.folder)]) == 0
    run.config.write_text("[]")
    assert "is not a run folder" in refused(capsys, "train", "--resume", str(run.folder))
    run.config.unlink()
    assert train(run.folder, npz, "--lr", "0.001") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_amp_and_channels_last_are_options_of_every_run(tmp_path, npz):
    assert (
        train(tmp_path / "run", npz, "--amp", "bf16", "--channels-last", "--method", "twins-trades", "--epochs", "1")
        == 0
    )
    losses = [line["loss"] for line in Run(tmp_path / "run").read_metrics() if line["kind"] == "train"]
    assert all(0 < loss < 20 for loss in losses)


def test_beside_runs_another_method_on_the_same_budget(tmp_path, npz, capsys):
    assert train(tmp_path / "run", npz, "--method", "twins-at", "--beside", "at", "--eval-before", "--epochs", "1") == 0
    table = capsys.readouterr().out
    for row in ("before (fresh head)", "TWINS-AT | adaptive", "TWINS-AT | frozen", "| AT |"):
        assert row in table
    assert Run(tmp_path / "run" / "at").result.exists()


def test_eval_reads_what_a_run_wrote(tmp_path, npz, capsys):
    train(tmp_path / "run", npz, "--method", "twins-at")
    result = json.loads(Run(tmp_path / "run").result.read_text())
    capsys.readouterr()
    for wing, key in (("adaptive", "after"), ("frozen", "after_frozen_wing")):
        checkpoint = str(tmp_path / "run" / "last.safetensors")
        assert cli.main(["eval", "--checkpoint", checkpoint, "--data-root", str(npz), "--wing", wing]) == 0
        said = capsys.readouterr().out
        assert f"clean {result[key]['clean']:.2%}" in said and f"{result[key]['robust']:.2%}, on 12" in said


def test_training_starts_from_a_pretrained_body_and_a_fresh_head(tmp_path, npz):
    source = CifarResNet(num_classes=7, width=8, blocks=(1, 1))
    save_checkpoint(tmp_path / "source.safetensors", source.state_dict(), {})
    recipe = get_recipe(
        "mini-pretrain", arch="tiny", checkpoint=str(tmp_path / "source.safetensors"), method="twins-at"
    )
    model = trainer.make_network(recipe, 3)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.layers[1][0].bn2.main_bn.weight, source.layers[1][0].bn2.weight)
    assert model.fc_downstream.weight.shape[0] == 3


def test_a_robust_imagenet_checkpoint_starts_the_published_network(tmp_path):
    """A file laid out like resnet50_linf_eps4.0.ckpt, into both wings of the CIFAR-10 recipe's network."""
    source = torchvision.models.resnet50()
    entries = {}
    for prefix in ("module.model.", "module.attacker.model."):
        entries |= {prefix + name: value for name, value in source.state_dict().items()}
    for name in ("module.normalizer.new_mean", "module.attacker.normalize.new_std"):
        entries[name] = torch.ones(3, 1, 1)
    path = tmp_path / "resnet50_linf_eps4.0.ckpt"
    torch.save({"model": entries, "epoch": 90, "schedule": {"last_lr": numpy.float64(0.1)}}, path)
    model = trainer.make_network(get_recipe("cifar10", checkpoint=str(path)), 10)
    own = model.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(own[name], value), name
    assert torch.equal(own["layer4.2.bn3.main_bn.running_var"], source.layer4[2].bn3.running_var)
    assert own["fc_downstream.weight"].shape == (10, 2048) and model.upsample == 224


def test_published_hyper_parameters():
    cifar, caltech = RECIPES["cifar10"], RECIPES["caltech256"]
    assert (cifar.lr, cifar.weight_decay, cifar.twins_lambda, cifar.upsample) == (3e-3, 1e-5, 1.0, 224)
    assert (caltech.lr, caltech.weight_decay, caltech.twins_lambda, caltech.upsample) == (3e-3, 1e-3, 0.4, None)
    for name in ("cifar10", "cifar100", "caltech256", "cub200", "stanford-dogs"):
        recipe = RECIPES[name]
        assert (recipe.batch_size, recipe.epochs, recipe.momentum, recipe.milestones) == (128, 60, 0.9, (30, 50))
        assert (recipe.eps, recipe.alpha, recipe.steps, recipe.method) == (8 / 255, 2 / 255, 10, "twins-at")


def test_learning_rates():
    recipe = RECIPES["cifar10"]
    rates = [trainer.learning_rate(recipe, step, 10) for step in (0, 299, 300, 499, 500, 599)]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])
    cycle = get_recipe("mini-pretrain", epochs=10, lr=1.0, warmup=0.3)
    rates = [trainer.learning_rate(cycle, step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.02) and rates.index(max(rates)) in (29, 30)
    assert rates[0] < 0.03 and rates[-1] < 0.01


def test_recipe_survives_json():
    for recipe in RECIPES.values():
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def refused(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_unknown_names_are_refused(capsys, npz, tmp_path):
    assert "unknown recipe 'cifar11'" in refused(capsys, "train", "--recipe", "cifar11")
    assert "unknown method 'fat'" in refused(capsys, "train", "--recipe", "mini", "--method", "fat")
    assert "unknown arch 'resnet51'" in refused(capsys, "train", "--recipe", "mini", "--arch", "resnet51")
    assert "--recipe is needed" in refused(capsys, "train")
    assert "eps must be a finite number >= 0, got -1" in refused(capsys, "train", "--recipe", "mini", "--eps", "-1")
    with pytest.raises(RecipeError, match="unknown recipe fields: colour"):
        Recipe.from_dict({"name": "x", "dataset": "npz", "colour": 1})


def test_a_device_that_is_not_there_is_refused(capsys, tmp_path):
    for device in ("cuda:99", "gpu"):
        with pytest.raises(SystemExit):
            cli.main(["train", "--recipe", "mini", "--run", str(tmp_path / "run"), "--device", device])
        assert f"no device '{device}' here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fields_that_contradict_each_other_are_refused(capsys, tmp_path):
    assert "beside must name" in refused(capsys, "train", "--recipe", "mini", "--method", "at")
    assert "beside must name" in refused(capsys, "train", "--recipe", "mini", "--beside", "trades,trades")
    assert "upsample must be at least 1" in refused(capsys, "train", "--recipe", "cifar10", "--upsample", "0")
    run = ["--run", str(tmp_path / "run"), "--checkpoint", "none"]
    said = refused(capsys, "train", "--recipe", "mini", "--upsample", "64", *run)
    assert "upsample must be none" in said and not (tmp_path / "run").exists()
    embedded = ["--checkpoint", "embedded", "--recipe", "mini"]
    assert "knows the classes airplane" in refused(capsys, "eval", *embedded)


def test_data_errors_leave_no_run_folder(capsys, tmp_path):
    run = tmp_path / "run"
    said = refused(capsys, "train", "--recipe", "cub200", "--run", str(run), "--data-root", str(tmp_path / "no"))
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
    assert "belongs to another recipe" in said and "arch is 'tiny'" in said
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"), "--eps", "4/255")
    assert "belongs to another recipe: eps is" in said
    assert "is not a run folder" in refused(capsys, "train", "--resume", str(tmp_path / "nothing"))


def test_truncated_checkpoint_is_refused_and_kept(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--epochs", "1") == 0
    last = tmp_path / "run" / "last.safetensors"
    cut = last.read_bytes()[:5000]
    last.write_bytes(cut)
    assert "last.safetensors" in refused(capsys, "train", "--resume", str(tmp_path / "run"))
    assert last.read_bytes() == cut


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, npz):
    assert train(tmp_path / "run", npz, "--lr", "1e30", "--epochs", "3") == 2
    assert "the loss is" in capsys.readouterr().err


def test_convert_checkpoint_and_info(capsys, tmp_path):
    torch.save({"state_dict": {"module.model.conv1.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert cli.main(["convert-checkpoint", str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "b.safetensors")[0].keys() == {"conv1.weight"}
    assert cli.main(["info"]) == 0
    assert "twin_batch_norm on cpu:" in capsys.readouterr().out


def test_every_architecture_takes_images():
    for name in ("cifar-resnet18-w16", "resnet18"):
        model = ARCHITECTURES[name](num_classes=3).eval()
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    model = ARCHITECTURES["resnet18"](num_classes=3, upsample=64).eval()
    x = torch.rand(1, 3, 32, 32)
    expected = model(x)
    model.upsample = None
    torch.testing.assert_close(model(torch.nn.functional.interpolate(x, size=(64, 64), mode="nearest")), expected)
