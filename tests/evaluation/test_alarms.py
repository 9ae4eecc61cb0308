"""Each alarm goes off for a network or figures that deserve it, and none for a network that does not."""

import pytest
import torch

from bench.attack import embedded
from tests.evaluation.helpers import Brightness, Constant, Quantised, Random, Saturated, grey
from twins_fast.evaluation import Column, Results, attack_named, robust_accuracy, transfer
from twins_fast.evaluation.alarms import alarms

LEVELS = [0.02 + 0.03 * n for n in range(33)]


def found(model, attacks="clean,pgd10", **options):
    return robust_accuracy(
        model, [grey(*LEVELS)], attacks, **{"eps": 0.1, "alpha": 0.02, "engine": "eager"} | options
    ).alarms


def test_a_network_without_fault():
    assert found(Brightness(), "clean,pgd10,pgd20x2,apgd,square300", eps=(0.05, 0.1)) == ()


def test_a_layer_without_a_gradient():
    said = "\n".join(found(Quantised(), ["clean", "pgd10", transfer("pgd10", Brightness())]))
    assert "the gradient of 32 of 32 images is zero" in said
    assert (
        "a large eps does not reach 0: PGD-50, 2 restarts, with eps 0.5 (linf)" in said and "of 32 images right" in said
    )
    assert "the loss does not rise under PGD-10, eps 0.1: from 0.1259 to 0.1259" in said
    assert "PGD-10 of another network, eps 0.1, which sees no gradient of this network, beats PGD-10" in said


def test_random_outputs():
    torch.manual_seed(0)
    said = "\n".join(found(Random()))
    assert (
        "outputs are random: two passes over the same 32 images differ by up to" in said and "autoattack-rand" in said
    )


def test_a_saturated_softmax():
    assert any("the gradient of 31 of 32 images is zero" in alarm for alarm in found(Saturated()))


def test_a_loss_that_does_not_rise():
    images = torch.rand(8, 3, 8, 8)
    results = robust_accuracy(Constant(), [(images, torch.zeros(8, dtype=torch.int64))], "clean,pgd10", engine="eager")
    assert any("the loss does not rise under PGD-10, eps 8/255: from 0.3133 to 0.3133" in a for a in results.alarms)


def test_no_attack_no_alarm():
    assert found(Quantised(), "clean") == () and found(Quantised(), warn=False) == ()


def column(name, eps, robust, after=()):
    right = torch.arange(100) < robust
    return Column(attack_named(name), eps, right, after, (1.0, 2.0))


def said(*columns):
    return alarms(Results(columns, torch.zeros(100, dtype=torch.int64), "linf", ("a",)))


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ("clean", "pgd10"),
        ("pgd10", "pgd100"),
        ("pgd10", "pgd10x5"),
        ("pgd10", "apgd"),
        ("apgd", "autoattack"),
        ("square", "autoattack"),
        ("apgd-ce20", "apgd-ce"),
    ],
)
def test_a_stronger_attack_that_scores_higher(weak, strong):
    (alarm,) = said(column(weak, 8 / 255, 40), column(strong, 8 / 255, 60))
    assert f"{attack_named(strong).title}, eps 8/255 is the stronger attack and scores higher than" in alarm
    assert "60.0% and 40.0% of 100 images" in alarm
    assert not said(column(weak, 8 / 255, 60), column(strong, 8 / 255, 40))
    assert not said(column(weak, 8 / 255, 50), column(strong, 8 / 255, 53))  # which may be chance


@pytest.mark.parametrize(("one", "other"), [("pgd100", "pgd10x5"), ("apgd", "apgd-dlr"), ("square", "apgd-t")])
def test_attacks_that_are_not_comparable(one, other):
    assert not [alarm for alarm in said(column(one, 0.1, 40), column(other, 0.1, 60)) if "stronger" in alarm]


def test_square_beats_the_best_gradient_attack():
    alarms = said(column("pgd10", 8 / 255, 60), column("apgd", 8 / 255, 55), column("square", 8 / 255, 40))
    expected = "Square, eps 8/255, which sees no gradient of this network, beats APGD-CE, which does: 40.0% and 55.0%"
    assert alarms == [f"{expected} of 100 images"]
    assert not said(column("apgd", 8 / 255, 40), column("square", 8 / 255, 60))


def test_a_larger_radius_that_scores_higher():
    (alarm,) = said(column("pgd10", 2 / 255, 30), column("pgd10", 8 / 255, 50))
    assert alarm == "PGD-10, eps 8/255 scores higher than with the smaller eps: 50.0% and 30.0% of 100 images"


def test_square_finds_what_the_gradient_attacks_left():
    stages = [("clean", 90), ("APGD-CE", 60), ("Square", 55)]
    after = tuple((title, torch.arange(100) < left) for title, left in stages)
    (alarm,) = said(column("autoattack:apgd-ce+square", 0.1, 55, after))
    assert "fools 5 of the 60 images that the attacks before it" in alarm


def test_a_real_network_sets_off_none():
    """The robust network that comes with the package, with a head of class means."""
    model, images, labels = embedded("cpu")
    results = robust_accuracy(model, [(images[:32], labels[:32])], "clean,pgd5,pgd10", eps=8 / 255, engine="eager")
    assert results.alarms == () and 0.05 < results["pgd10"].accuracy < results["clean"].accuracy
