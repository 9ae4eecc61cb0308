"""What is measured of a run, against a few lines of plain arithmetic each."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from tests.train.helpers import assert_same_run, refused, train
from twins_fast import PGD, TrainingStep, adversarial_loss, convert_twin_bn
from twins_fast.evaluation import Accuracy
from twins_fast.nn import TwinBatchNorm2d
from twins_fast.train import cli, trainer
from twins_fast.train.dynamics import Dynamics, robust_gap
from twins_fast.train.run_folder import RunFolder

RATES = (0.2, 0.05, 0.1)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than these runs."""
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)


@pytest.fixture
def model(tiny_model):
    return convert_twin_bn(tiny_model).train()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(8, 3, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def length(tensors):
    return float(np.sqrt(sum((np.float64(t.detach().numpy()) ** 2).sum() for t in tensors)))


def measured(model, tmp_path):
    """The figures after three steps, and those steps again without any of our parts but the loss."""
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = optimizer_of(model)
    attack = PGD(model, steps=1, random_start=False, engine="eager")
    step = TrainingStep(model, optimizer, method="twins-at", attack=attack, gradient_norms=True)
    dynamics = Dynamics(model, optimizer, every=3)
    dynamics.keep_start(tmp_path / "start.safetensors")
    for (images, labels), rate in zip(batches(), RATES, strict=True):
        dynamics.look(step(images, labels, rate)["gradient_norms"])
    figures = dynamics.measure(RATES[-1])

    gradients, other = [], optimizer_of(twin)
    attack = PGD(twin, steps=1, random_start=False, engine="eager")
    for (images, labels), rate in zip(batches(), RATES, strict=True):
        other.zero_grad()
        adversarial_loss(twin, images, labels, method="twins-at", attack=attack)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in twin.named_parameters()})
        other.param_groups[0]["lr"] = rate
        other.step()
    return figures, start, twin, gradients


def test_every_figure(model, tmp_path):
    figures, start, twin, gradients = measured(model, tmp_path)
    ends = dict(twin.named_parameters())
    begins = dict(start.named_parameters())
    kernels = [name for name, p in ends.items() if p.dim() > 1]
    assert figures["batches"] == 3 and figures["layers"] == [name.removesuffix(".weight") for name in kernels]
    assert len(kernels) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in twin.modules())

    def check(name, of):
        """``of`` a list of names of parameters."""
        assert figures[name] == pytest.approx(of(list(ends)), rel=1e-4)
        assert figures[name + "s"] == pytest.approx([of([kernel]) for kernel in kernels], rel=1e-4)

    check("weight_norm", lambda names: length(ends[n] for n in names))
    check("distance", lambda names: length(ends[n] - begins[n] for n in names))
    check("effective_lr", lambda names: RATES[-1] / length(ends[n] for n in names) ** 2)
    norms = lambda names: [length(g[n] for n in names) for g in gradients]  # noqa: E731
    check("gradient_norm", lambda names: np.mean(norms(names)))
    check("gradient_variance", lambda names: np.var(norms(names), ddof=1))


def test_how_far_the_wings_are_apart(model):
    with torch.no_grad():
        for number, layer in enumerate(m for m in model.modules() if isinstance(m, TwinBatchNorm2d)):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.main_bn.running_var.uniform_(0.1, 1)
            layer.eps = layer.main_bn.eps = 0.1 * number
    figures = Dynamics(model, optimizer_of(model), every=1).measure(0.1)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TwinBatchNorm2d)}
    assert figures["wings"] == list(layers) and len(layers) > 3
    means, variances = [], []
    for layer in layers.values():
        frozen = layer.main_bn
        own, its = ((bn.running_var.double() + layer.eps).numpy() for bn in (layer, frozen))
        means.append((layer.running_mean - frozen.running_mean).numpy() / np.sqrt(its))
        variances.append(np.log(own / its))
    for name, parts in (("mean_shift", means), ("variance_shift", variances)):
        assert figures[name] == pytest.approx(np.sqrt(np.mean(np.concatenate(parts) ** 2)), rel=1e-4)
        assert figures[name + "s"] == pytest.approx([np.sqrt(np.mean(part**2)) for part in parts], rel=1e-4)


def test_what_is_not_known_is_left_out(tiny_model):
    with torch.no_grad():
        tiny_model.conv1.weight.zero_()
    count = len(list(tiny_model.parameters()))
    dynamics = Dynamics(tiny_model, optimizer_of(tiny_model), every=1)
    dynamics.look(torch.full((count,), float("inf")))  # of half precision: the step is skipped
    figures = json.loads(json.dumps(dynamics.measure(0.1), allow_nan=False))
    assert not {"distance", "gradient_norm", "wings", "mean_shift"} & figures.keys() and figures["batches"] == 0
    assert figures["effective_lrs"][0] is None and figures["effective_lr"] > 0
    dynamics.look(torch.ones(count))
    figures = dynamics.measure(0.1)
    assert figures["gradient_norm"] == pytest.approx(count**0.5, rel=1e-5) and "gradient_variance" not in figures


def test_the_robust_gap_is_that_of_an_epoch():
    lines = [{"kind": "train", "step": n, "accuracy": 0.5} for n in range(1, 5)]
    lines += [{"kind": "test", "step": 4}, {"kind": "train", "step": 5, "accuracy": 0.1, "adaptive_accuracy": 1.0}]
    assert robust_gap(lines, 2, 0.25) == pytest.approx((0.5 + 0.5 + 1.0) / 3 - 0.25)
    assert robust_gap(lines, 5, 0.25) is None


@pytest.mark.parametrize(("method", "known"), [("twins-at", True), ("standard", False), ("noise", False)])
def test_gaps_of_a_run(no_pictures, tmp_path, npz, method, known, monkeypatch):
    falling = iter((0.75, 0.5, 0.25))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Accuracy(clean=0.8, robust=next(falling), images=12))
    assert train(tmp_path / "run", npz, "--method", method, "--log.dynamics", "0") == 0
    run = RunFolder(tmp_path / "run")
    lines, result = run.read_metrics(), run.read_result()
    assert {line["kind"] for line in lines} == {"train", "test"} and not run.start.exists()
    for test in (line for line in lines if line["kind"] == "test"):
        assert ("robust_gap" in test) == known
        epoch = [line for line in lines if line["kind"] == "train" and test["step"] - 3 < line["step"] <= test["step"]]
        if known:
            expected = np.mean([line["adaptive_accuracy"] for line in epoch]) - test["robust"]
            assert len(epoch) == 3 and test["robust_gap"] == pytest.approx(expected)
    robust = [line["robust"] for line in lines if line["kind"] == "test"]  # the best network is chosen on these
    assert result["robust_overfitting"] == max(robust) - robust[-1] == 0.25


def test_a_resumed_run_may_measure_otherwise(no_pictures, tmp_path, npz, monkeypatch):
    """From the start on, in another interval, or no more; the trajectory is the same."""
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    step = trainer.Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, *batch)

    for before, after, steps, distance in ((0, 2, [4, 6], False), (4, 3, [6], True), (1, 0, [1, 2, 3], True)):
        run = RunFolder(tmp_path / f"{before} {after}")
        monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
        assert train(run.folder, npz, "--log.dynamics", str(before)) == 130
        monkeypatch.setattr(trainer.Trainer, "train_step", step)
        assert cli.main(["train", "--resume", str(run.folder), "--log.dynamics", str(after)]) == 0
        lines = [line for line in run.read_metrics() if line["kind"] == "dynamics"]
        assert [line["step"] for line in lines] == steps
        assert all(("distance" in line) == distance for line in lines)


def test_a_full_disk_loses_nothing(no_pictures, tmp_path, npz, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    assert train(tmp_path / "whole", npz, "--log.dynamics", "2") == 0
    log = RunFolder.log

    def full(self, **line):
        if line["kind"] == "dynamics" and line["step"] == 4:
            self.metrics = self.folder / "full"
            self.metrics.symlink_to("/dev/full")
        log(self, **line)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", full)
        capsys.readouterr()
        assert train(tmp_path / "cut", npz, "--log.dynamics", "2") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(tmp_path / "cut" / "full") in said and said.count("\n") == 1
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


BROKEN_LINES = [b"{", b"3", b'{"kind": "train"}', b"\0\0", b'"\xff"']
BROKEN_LINES += [b'{"kind": "train", "step": 1, "epoch": 1, "loss": "high"}']


@pytest.mark.parametrize("broken", BROKEN_LINES)
def test_a_broken_line_is_named_and_a_cut_one_left_out(tmp_path, broken, capsys, npz):
    run = RunFolder(tmp_path)
    run.log(kind="train", step=1, epoch=0.5)
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + broken)
    assert len(run.read_metrics()) == 1
    run.metrics.write_bytes(whole + broken + b"\n" + whole)
    run.config.write_text("{}")
    said = refused(capsys, "plot", str(run.folder))
    assert f"'{run.metrics}': line 2 is broken (" in said and "once it is deleted the run goes on" in said
    assert os.path.getsize(run.metrics) == 2 * len(whole) + len(broken) + 1
