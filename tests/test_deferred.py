"""Checks of values on a GPU: nothing waits, and what is wrong is raised later, with the message of a CPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twins_fast import PGD, adversarial_loss, deferred
from twins_fast.validation import check_images


class Reads(TorchDispatchMode):
    """Counts the values that the host looks at, for which it would wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


class Event:
    def __init__(self, arrived):
        self.query = arrived


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors are taken for a GPU's; values arrive when ``arrived`` is set."""

    class Gpu:
        arrived, capturing = False, False

    monkeypatch.setattr(deferred, "_is_on_gpu", lambda values: True)
    monkeypatch.setattr(deferred, "_send", lambda values: (Event(lambda: Gpu.arrived), values.clone()))
    monkeypatch.setattr(deferred, "capturing", lambda device: Gpu.capturing)
    yield Gpu
    deferred._sent.clear()


def nan_pixel(images, labels):
    images[1, 0, 0, 0] = torch.nan


def bright_pixel(images, labels):
    images[0, 0, 0, 0] = 1.5


def negative_label(images, labels):
    labels[0] = -3


def label_without_a_class(images, labels):
    labels[0] = 7


BAD = {
    nan_pixel: "images hold 1 NaN pixel values",
    bright_pixel: r"images must lie in \[0, 1\], got values from .* to 1.5",
    negative_label: "labels must not be negative, got -3",
    label_without_a_class: "labels hold class 7, but the model has 3 classes",
}


def step(model, images, labels, engine):
    return adversarial_loss(model, images, labels, method="at", attack=PGD(model, steps=2, engine=engine))


@pytest.mark.parametrize("engine", ["plan", "eager"])
def test_a_training_step_waits_for_nothing(gpu, tiny_model, batch, engine):
    step(tiny_model, *batch, engine)  # plans
    attack = PGD(tiny_model, steps=2, engine=engine)
    attack(*batch)
    with Reads() as reads:
        adversarial_loss(tiny_model, *batch, method="at", attack=attack)
    assert reads.count == 1  # the NaN warning, which on a CPU costs nothing
    assert len(deferred._sent) >= 6
    gpu.arrived = True
    deferred.raise_found()
    assert not deferred._sent


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["the next step", "nan_gradients"])
def test_what_is_wrong_is_raised_later(gpu, tiny_model, batch, bad, how, monkeypatch):
    for module in ("twins_fast.methods.base", "twins_fast.attacks.objectives"):
        monkeypatch.setattr(f"{module}.indexable", lambda labels, classes: labels.clamp(0, classes - 1))
    images, labels = (t.clone() for t in batch)
    bad(images, labels)
    attack = PGD(tiny_model, steps=1, engine="eager")
    adversarial_loss(tiny_model, images, labels, method="at", attack=attack)
    adversarial_loss(tiny_model, *batch, method="at", attack=attack)  # nothing has arrived
    gpu.arrived = True
    with pytest.raises(ValueError, match=BAD[bad]):
        attack(*batch) if how == "the next step" else attack.nan_gradients  # noqa: B018
    deferred.raise_found()  # once


def test_nothing_is_checked_in_a_capture(gpu):
    gpu.capturing = gpu.arrived = True
    check_images(torch.full((1, 3, 2, 2), 2.0), nn.Identity())
    assert not deferred._sent


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_on_a_cpu_it_is_raised_at_once(tiny_model, batch, bad):
    images, labels = (t.clone() for t in batch)
    bad(images, labels)
    for engine in ("plan", "eager"):
        with pytest.raises(ValueError, match=BAD[bad]):
            step(tiny_model, images, labels, engine)


def test_labels_outside_the_classes_do_not_end_cuda():
    from twins_fast.validation import indexable

    class OnGpu:
        is_cuda = True

        def is_floating_point(self):
            return False

        def clamp(self, low, high):
            return low, high

    assert indexable(OnGpu(), 10) == (0, 9)
    labels = torch.tensor([1, 12])
    assert indexable(labels, 10) is labels
