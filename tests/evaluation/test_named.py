"""What the names of attacks mean, and that AutoAttack is pyautoattack's."""

import pyautoattack
import pytest
import torch

from tests.evaluation.helpers import learned, small_network
from twins_fast import PGD
from twins_fast.evaluation import attack_named
from twins_fast.evaluation.named import Ascent, Clean, Part, Threat, attacks_named


@pytest.mark.parametrize(
    ("name", "title", "stages"),
    [
        ("clean", "clean", (Clean(),)),
        ("pgd10", "PGD-10", (Ascent(10),)),
        ("pgd20x5", "PGD-20, 5 restarts", (Ascent(20, 5),)),
        ("apgd", "APGD-CE", (Ascent(100, rule="apgd"),)),
        ("apgd-ce", "APGD-CE", (Ascent(100, rule="apgd"),)),
        ("apgd-dlr50x2", "APGD-DLR-50, 2 restarts", (Ascent(50, 2, "apgd", "dlr"),)),
        ("square500", "Square-500", (Clean(), Part("square", budget=500))),
        ("fab-t", "FAB-T", (Clean(), Part("fab-t"))),
        ("autoattack:apgd-ce20+square", "AutoAttack (APGD-CE-20 + Square)", None),
        ("autoattack", "AutoAttack", (Clean(), *map(Part, ("apgd-ce", "apgd-t", "fab-t", "square")))),
    ],
)
def test_names(name, title, stages):
    attack = attack_named(name)
    assert (attack.name, attack.title) == (name, title)
    assert stages is None or attack.stages == stages


@pytest.mark.parametrize(
    "name", ["pgd", "pgdx2", "pgd10x0", "pgd-dlr10", "fgsm", "", "apgd-t+square", "autoattack:", "autoattack:pgd10"]
)
def test_what_is_no_attack(name):
    with pytest.raises(ValueError, match=f"unknown attack '{name}'".replace("+", r"\+")):
        attack_named(name)


def test_lists():
    assert [attack.name for attack in attacks_named("clean, pgd10")] == ["clean", "pgd10"]
    with pytest.raises(ValueError, match="each attack once, got clean, clean"):
        attacks_named("clean,clean")


@pytest.mark.parametrize("version", ["standard", "plus"])
def test_versions_are_those_of_pyautoattack(version):
    made = pyautoattack.AutoAttack(small_network(), version=version)
    name = "autoattack" if version == "standard" else f"autoattack-{version}"
    assert [stage.name for stage in attack_named(name).attacks] == made.attacks_to_run


def test_the_stages_in_turn_are_autoattack_bit_for_bit():
    """The same images as in one go, with its own settings but for the budgets."""
    model, images, labels = learned()
    made = pyautoattack.AutoAttack(model, norm="Linf", eps=2 / 255, seed=3)
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = 4
    for apgd in (made.apgd, made.apgd_targeted):
        apgd.n_iter = 5
    made.fab.n_iter, made.square.n_queries = 2, 20
    expected = made.run_standard_evaluation(images, labels, batch_size=len(images))[0]

    found, left = images.clone(), torch.ones(len(images), dtype=torch.bool)
    threat = Threat(eps=2 / 255, seed=3, engine="eager")
    for name, budget in (("apgd-ce", 5), ("apgd-t", 5), ("fab-t", 2), ("square", 20)):
        if left.any():
            found[left] = Part(name, budget=budget).on(model, threat)(images[left], labels[left])
            with torch.no_grad():
                left = model(found).argmax(1) == labels
    assert torch.equal(found, expected) and not torch.equal(found, images) and left.any()


def test_pgd_is_that_of_the_published_evaluation():
    model, images, labels = learned()
    threat = Threat(eps=2 / 255, alpha=1 / 255)
    expected = PGD(model, 2 / 255, 1 / 255, 5, random_start=False)(images, labels)
    assert torch.equal(Ascent(5).on(model, threat)(images, labels), expected)


def test_too_few_classes_for_a_loss():
    images, labels = torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="APGD-T needs at least 4 classes, the network has 3"):
        Part("apgd-t").on(small_network(3), Threat())(images, labels)
