"""Robust accuracy: figures, what is kept, kills, and attacks that cheat."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from tests.evaluation.helpers import Brightness, batches, grey, learned
from twins_fast import PGD
from twins_fast.evaluation import NamedAttack, Record, evaluate, robust, robust_accuracy, transfer
from twins_fast.evaluation.named import Ascent, Clean, Stage

LEVELS = (0.1, 0.3, 0.4, 0.46, 0.55, 0.8)  # the border of Brightness is at 0.5


def figures(results):
    return {(column.name, column.eps): column.right.tolist() for column in results.columns}


def test_image_by_image():
    images, labels = grey(*LEVELS)
    labels[0] = 1  # which the network gets wrong
    results = robust_accuracy(
        Brightness(),
        batches(images, labels, 4),
        "clean,pgd10,apgd20,square50",
        eps=(0.02, 0.07, 0.15),
        alpha=0.02,
        engine="eager",
    )
    left = {0.02: [0, 1, 1, 1, 1, 1], 0.07: [0, 1, 1, 0, 0, 1], 0.15: [0, 1, 0, 0, 0, 1]}
    for eps, expected in left.items():
        for name in ("pgd10", "apgd20", "all"):
            assert results[name, eps].right.tolist() == [bool(x) for x in expected], (name, eps)
        assert (results["square50", eps].right >= results["all", eps].right).all()
    assert results["clean"].right.tolist() == [False, *[True] * 5]
    assert results.images == 6 and results.alarms == ()
    assert results["pgd10", 0.07].standard_error == pytest.approx((0.5 * 0.5 / 6) ** 0.5)
    with pytest.raises(KeyError, match="is not one of"):
        results["pgd10"]  # of which radius?


def test_pgd_is_what_the_trainer_measures():
    model, images, labels = learned()
    measured = evaluate(model, batches(images, labels), PGD(model, 2 / 255, steps=5, random_start=False))
    results = robust_accuracy(model, batches(images, labels), "clean,pgd5", eps=2 / 255)
    assert (results["clean"].accuracy, results["pgd5"].accuracy) == (measured.clean, measured.robust)
    assert 0 < measured.robust < 1


def test_half_precision_is_judged_by_the_network_itself(monkeypatch):
    model, images, labels = learned()
    seen = []
    attack = robust.judged
    monkeypatch.setattr(robust, "judged", lambda *arguments: seen.append(arguments[0]) or attack(*arguments))
    half = robust_accuracy(model, [(images, labels)], "pgd5,apgd-t2", eps=2 / 255, amp_dtype=torch.bfloat16)
    exact = robust_accuracy(model, [(images, labels)], "pgd5,apgd-t2", eps=2 / 255)
    assert len(seen) == 3 and seen[0] is model  # PGD; clean and APGD-T
    for name in ("pgd5", "apgd-t2"):
        assert abs(half[name].accuracy - exact[name].accuracy) <= 0.1


def test_the_mode_and_the_generators_are_as_before():
    model, images, labels = learned()
    model.train()
    state = torch.get_rng_state()
    robust_accuracy(model, batches(images, labels), "pgd2x2,square3", eps=2 / 255, engine="eager")
    assert model.training and torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Cheat(Stage):
    by: float
    title = "a cheat"
    passes = 1

    def on(self, model, threat):
        return lambda images, labels: images + self.by


@pytest.mark.parametrize(("level", "by"), [(0.5, 0.1), (0.97, 0.05), (0.5, float("nan"))])
def test_images_outside_the_ball_are_an_error(level, by):
    images, labels = grey(level)
    with pytest.raises(RuntimeError, match="a cheat left the ball: up to .*, where eps is 0.05 .linf."):
        cheat = NamedAttack("cheat", "a cheat", (Cheat(by),))
        robust_accuracy(Brightness(), [(images, labels)], [cheat], eps=0.05, warn=False)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_norm_keeps_to_its_ball(norm):
    model, images, labels = learned()
    eps = {"linf": 2 / 255, "l2": 0.2, "l1": 3.0}[norm]
    names = "pgd5,apgd-t2,fab-t2,square10" + (",apgd5x2" if norm != "l1" else "")
    results = robust_accuracy(
        model, [(images, labels)], names, eps=eps, alpha=eps / 2, norm=norm, warn=False, engine="eager"
    )
    assert results["all"].accuracy < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "no test images"),
        ({"labels": [0, 7]}, "labels hold class 7, but the model has 2 classes"),
        ({"images": 2.0}, r"images must lie in \[0, 1\]"),
        ({"eps": (0.1, 0.1)}, "each radius once"),
        ({"eps": 8.0}, "did you mean 8/255"),
        ({"attacks": "fgsm"}, "unknown attack 'fgsm'"),
    ],
)
def test_what_makes_no_sense(given, message):
    images, labels = grey(0.2, 0.8)
    labels = torch.tensor(given.pop("labels", labels.tolist()))
    data = given.pop("batches", [(images * given.pop("images", 1.0), labels)])
    with pytest.raises(ValueError, match=message):
        robust_accuracy(Brightness(), data, engine="eager", **given)


def test_what_is_known_is_not_attacked_again(tmp_path, monkeypatch):
    model, images, labels = learned()
    names, data = "clean,pgd3,autoattack:apgd-ce2+square5", batches(images, labels)
    calls = []
    attack = robust._Batch._attacked
    monkeypatch.setattr(
        robust._Batch, "_attacked", lambda self, stage, *rest: calls.append(stage) or attack(self, stage, *rest)
    )

    def run(model=model, data=data, eps=(1 / 255, 2 / 255), **options):
        calls.clear()
        options.setdefault("record", Record(tmp_path / "record"))
        return robust_accuracy(model, data, names, eps=eps, warn=False, engine="eager", **options)

    first = run()
    assert len(calls) == 3 * (1 + 2 * 3)  # batches; clean once, the others with each radius
    assert figures(run()) == figures(first) and not calls
    assert figures(run(record=Record(tmp_path / "record", again=True))) == figures(first) and len(calls) == 21
    run(eps=3 / 255)
    assert len(calls) == 3 * 3
    run(data=[*data[:2], batches(images, labels.flip(0))[2]])
    assert len(calls) == 7  # the third batch
    run(alpha=1 / 255, eps=2 / 255)
    assert [type(stage) for stage in calls] == [Ascent] * 3  # AutoAttack knows no alpha
    with torch.no_grad():
        model.fc_downstream.bias[0] += 0.1
    run()
    assert len(calls) == 21


def test_kept_images(tmp_path):
    model, images, labels = learned()
    data = batches(images, labels)

    def run(record, **options):
        return robust_accuracy(model, data, "clean,pgd3,square5", eps=2 / 255, record=record, engine="eager", **options)

    plain = run(Record(tmp_path / "record"), warn=False)
    assert plain["pgd3"].images is None and plain.clean is None
    first = run(Record(tmp_path / "record", tmp_path / "parts"), keep_images=True, warn=False)  # known, but no images
    again = run(Record(tmp_path / "record", tmp_path / "parts"), keep_images=True, warn=False)
    for results in (first, again):
        assert torch.equal(results.clean, images) and figures(results) == figures(plain)
        with torch.no_grad():
            seen = model(results["pgd3"].images).argmax(1)
        assert torch.equal(seen == labels, results["pgd3"].right)
    for name in ("pgd3", "square5"):
        assert torch.equal(first[name].images, again[name].images)


def test_transfer():
    """Of a network to itself it is as good as the attack."""
    model, images, labels = learned()
    same = transfer("pgd5", model)
    results = robust_accuracy(model, [(images, labels)], ["pgd5", same], eps=2 / 255, warn=False, engine="eager")
    assert isinstance(same.stages[0], Clean) and torch.equal(results["pgd5"].right, results["transfer"].right)


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tests.evaluation.helpers import batches, learned
from twins_fast.evaluation import Record, robust_accuracy
model, images, labels = learned(count=20)
names = "clean,pgd3x2,autoattack:apgd-ce5+apgd-t2+fab-t2+square20"
print("ready", flush=True)
options = {"eps": (1 / 255, 2 / 255), "record": Record(sys.argv[1]), "engine": "eager"}
results = robust_accuracy(model, batches(images, labels, 4), names, **options)
print([(column.name, column.right.tolist(), column.loss) for column in results.columns])
"""


@pytest.mark.parametrize("parts", [[0.4], pytest.param([0.1, 0.4, 0.7], marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(tmp_path, parts):
    path, chance = tmp_path / "cut", random.Random(0)

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    def lines(path):
        return path.read_bytes().count(b"\n") if path.exists() else 0

    whole = start(tmp_path / "whole").communicate()[0]
    total = lines(tmp_path / "whole")
    for part in parts:
        process = start(path)
        while lines(path) < part * total and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert parts[-1] * total <= lines(path) < total
    path.write_bytes(path.read_bytes() + b'{"key": "torn')
    assert start(path).communicate()[0] == whole
    assert lines(path) == total + 1
