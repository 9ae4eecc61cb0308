"""Every method, and what goes around it, from the command line: a short run on real images that resumes bit for bit."""

import json

import numpy as np
import pytest
import torch

from tests.train.helpers import assert_same_run, refused
from twins_fast.checkpoints import load_checkpoint, read_state_dict, save_checkpoint
from twins_fast.methods import METHODS
from twins_fast.models import build_model
from twins_fast.train import assets, cli, trainer
from twins_fast.train.build import mix
from twins_fast.train.recipes import get_recipe
from twins_fast.train.run_folder import RunFolder

FEW = ["--epochs", "2", "--optimizer.milestones", "1", "--batch-size", "4", "--steps", "1", "--evaluation.steps", "1"]
FEW += ["--attack.engine", "eager", "--run.baselines", "", "--evaluation.no-before", "--evaluation.every", "2"]
FEW += ["--arch", "tiny", "--log.dynamics", "2"]
# fmt: off
AROUND = {
    "awp": ["--method", "twins-trades", "--regularisation.awp", "0.01", "--regularisation.awp-warmup", "1"],
    "ema": ["--method", "twins-at", "--method.affine", "shared", "--regularisation.ema", "0.9"],
    "auto": ["--optimizer.schedule", "auto", "--optimizer.patience", "1", "--lr", "0.5", "--batch-size", "3",
             "--evaluation.choose-on", "validation", "--evaluation.validation-part", "0.3", "--evaluation.every", "1"],
    "mixup": ["--method", "twins-at", "--regularisation.mix", "mixup"],
    "cutmix": ["--method", "trades", "--regularisation.mix", "cutmix", "--regularisation.label-smoothing", "0.1"],
    "warm-up": ["--method", "twins-at", "--method.frozen-statistics", "target", "--method.affine", "shared"],
    "probed head": ["--network.init-head", "adversarial-probe", "--network.probe-epochs", "1"],
    "label smoothing": ["--method", "twins-trades", "--regularisation.label-smoothing", "0.1"],
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """8 training and 4 test images of the embedded ones, and no pictures."""
    images, labels, classes, train_images = assets.read_images()
    chosen = np.r_[:8, train_images : train_images + 4]
    monkeypatch.setattr(assets, "read_images", lambda: (images[chosen], labels[chosen], classes, 8))
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)


def arrays_of_source():
    """Images of the three classes of the pre-training."""
    images, labels = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8), np.arange(10) % 3
    return {"train": images, "train_labels": labels, "test": images, "test_labels": labels}


@pytest.fixture
def train(tmp_path):
    """Trains the tiny network from a pre-trained one of three other classes."""
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "source.safetensors", build_model("tiny", 3).state_dict(), {})
    np.savez(tmp_path / "source.npz", **arrays_of_source())
    command = [
        "train",
        "--data.source",
        str(tmp_path / "source.npz"),
        "--recipe",
        "mini",
        *FEW,
        "--checkpoint",
        str(tmp_path / "source.safetensors"),
    ]
    return lambda name, *more: cli.main([*command, "--run", str(tmp_path / name), *more])


@pytest.mark.parametrize(
    "options",
    [pytest.param(["--method", name], id=name) for name in METHODS]
    + [pytest.param(options, id=name) for name, options in AROUND.items()],
)
def test_a_run_resumes_bit_for_bit(tmp_path, train, monkeypatch, options):
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    assert train("whole", *options) == 0
    step = trainer.Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    assert train("cut", *options) == 130
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    lines = RunFolder(tmp_path / "cut").read_metrics()
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    measured = [line for line in lines if line["kind"] == "dynamics"]
    assert len(losses) == 4 and all(0 < loss < 50 for loss in losses)
    assert [(line["step"], line["batches"]) for line in measured] == [(2, 2), (4, 2)]
    assert all(line["gradient_norm"] > 0 and line["distance"] > 0 for line in measured)


def test_the_help_names_every_method(capsys):
    assert cli.main(["train", "--help"]) == 0
    said = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--method{" + ",".join(METHODS) + "}" in said


def test_what_a_loss_cannot_have_is_refused(capsys, tmp_path):
    for words, what in (("label-smoothing 0.1", "label smoothing"), ("mix cutmix", "mixed images")):
        said = refused(capsys, "train", "--recipe", "mini", "--method", "mart", *f"--regularisation.{words}".split())
        assert f"'mart' needs one class for each image: it cannot have {what}" in said


def test_a_probed_head_is_where_training_starts(tmp_path, train):
    probed = ["--network.init-head", "adversarial-probe", "--network.probe-epochs", "1", "--method", "twins-at"]
    assert train("run", *probed, "--lr", "0") == 0
    head, trained = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("run/head", "run"))
    assert train("other", "--method", "twins-at", "--lr", "0") == 0
    random = load_checkpoint(tmp_path / "other/last.safetensors")[0]
    for name in ("model.fc_downstream.weight", "model.fc_downstream.bias"):
        assert torch.equal(head[name], trained[name]) and not torch.equal(random[name], trained[name])
    assert torch.equal(head["model.conv1.weight"], random["model.conv1.weight"])
    assert RunFolder(tmp_path / "run" / "head").load_config()[0].method.name == "adversarial-linear-probe"


def test_the_average_is_what_is_evaluated_and_kept(tmp_path, train):
    assert train("run", "--method", "at", "--regularisation.ema", "0.9", "--evaluation.every", "1") == 0
    run = RunFolder(tmp_path / "run")
    last, best = (load_checkpoint(path)[0] for path in (run.last, run.best))
    own = {name: last["model." + name] for name in best}
    assert not torch.equal(last["unaveraged.conv1.weight"], own["conv1.weight"])
    network = read_state_dict(run.last)
    assert network.keys() == best.keys() and all(torch.equal(network[name], own[name]) for name in own)
    result = run.read_result()
    if result["best"]["epoch"] == 2:
        assert all(torch.equal(best[name], own[name]) for name in best)
    assert cli.main(["eval", str(run.last), "--json", str(tmp_path / "eval.json")]) == 0
    *_, attacked = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert attacked["accuracy"] == result["after"]["robust"]


def test_the_branch_of_autolora_is_dropped_at_the_end(tmp_path, train):
    assert train("run", "--method", "autolora", "--evaluation.every", "1") == 0
    run = RunFolder(tmp_path / "run")
    last, best = (load_checkpoint(path)[0] for path in (run.last, run.best))
    assert any("low_rank" in name for name in last) and not any("low_rank" in name for name in best)
    assert cli.main(["eval", str(run.folder)]) == cli.main(["eval", str(run.last)]) == 0


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(kind):
    torch.manual_seed(0)
    recipe = get_recipe("mini", regularisation={"mix": kind})
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    mixed, labels = mix(recipe, 4)(images, torch.arange(4))
    for row in range(4):  # the mean pixel is the mean number of the two images
        assert labels[row].sum() == pytest.approx(1) and (labels[row] > 0).sum() <= 2
        assert mixed[row].mean() == pytest.approx(float((labels[row] * torch.arange(4)).sum()), abs=1e-5)
    assert not torch.equal(mixed, images)
