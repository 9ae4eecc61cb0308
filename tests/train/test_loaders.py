"""Order, augmentation and batches."""

import pytest
import torch

from twins_fast.train.datasets import load_datasets
from twins_fast.train.loaders import EpochBatches, loaders


def batches(sets, epoch=0, first=0, workers=0):
    loader = loaders(*sets, batch_size=8, workers=workers).train
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    return list(loader)


def test_npz_batches_are_float_images_in_zero_one(npz):
    train, test, classes = load_datasets("npz", npz)
    assert classes == ("0", "1", "2") and (len(train), len(test)) == (24, 12)
    images, labels = batches((train, test))[0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert 0 <= images.min() and 0.5 < images.max() <= 1
    loader = loaders(train, test, batch_size=8).test
    seen = torch.cat([images for images, _ in loader])
    expected = torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen, expected)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(npz):
    sets = load_datasets("npz", npz)[:2]
    first = batches(sets)
    torch.rand(7)  # somebody else uses the global generator
    again = batches(sets)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    resumed = batches(sets, first=2)
    assert len(resumed) == 1 and torch.equal(resumed[0][0], first[2][0])
    assert not torch.equal(batches(sets, epoch=1)[0][1], first[0][1])
    workers = batches(sets, workers=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, workers, strict=True))


def test_augmentation_leaves_the_global_generator_alone(npz):
    sets = load_datasets("npz", npz)[:2]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    dataset = loaders(*sets, batch_size=8).train.dataset
    dataset[0, 5], dataset[1, 5]
    assert torch.equal(torch.rand(2), expected)


def test_a_last_batch_too_small_for_two_wings_is_left_out():
    assert len(EpochBatches(27, 8, seed=0, shuffle=True)) == 3
    assert len(EpochBatches(28, 8, seed=0, shuffle=True)) == 4
    assert len(EpochBatches(25, 8, seed=0, shuffle=False)) == 4


def test_numbers_and_names_are_checked_before_anything_is_loaded(npz):
    sets = load_datasets("npz", npz)[:2]
    for options, message in (
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"batch_size": 8, "augmentation": "flip"}, "unknown augmentation 'flip'"),
        ({"batch_size": 8, "workers": -1}, "workers must be a finite number >= 0, got -1"),
        ({"batch_size": 8, "evaluation_images": -1}, "evaluation_images must be a finite number >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loaders(*sets, **options)


def test_validation_images_are_set_apart_and_not_augmented(npz):
    train, test = load_datasets("npz", npz)[:2]
    made = loaders(train, test, batch_size=8, validation_part=0.25, seed=3)
    again = loaders(train, test, batch_size=8, validation_part=0.25, seed=3)
    assert (len(made.train.dataset), len(made.validation.dataset), len(made.test.dataset)) == (18, 6, 12)
    apart, rest = made.validation.dataset.base.indices, made.train.dataset.base.indices
    assert sorted([*apart, *rest]) == list(range(24)) and apart == again.validation.dataset.base.indices
    images = next(iter(made.validation))[0]
    torch.testing.assert_close(images, torch.from_numpy(train.images[apart]).permute(0, 3, 1, 2) / 255)
    limited = loaders(train, test, batch_size=8, validation_part=0.5, evaluation_images=5)
    assert (len(limited.validation.dataset), len(limited.test.dataset)) == (5, 5)
    assert loaders(train, test, batch_size=8).validation is None
    with pytest.raises(ValueError, match="the validation set has 0 images; at least 1 needed"):
        loaders(train, test, batch_size=8, validation_part=0.001)
    with pytest.raises(ValueError, match="validation_part must be less than 1, got 1"):
        loaders(train, test, batch_size=8, validation_part=1)
