"""Small data sets in the formats of the real ones, read by torchvision; only their checksums are switched off."""

import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import Flowers102

from twins_fast.train import cli
from twins_fast.train.datasets import CIFAR10_CLASSES, DataError, load_datasets
from twins_fast.train.loaders import loaders
from twins_fast.train.recipes import RECIPES
from twins_fast.train.run_folder import RunFolder
from twins_fast.train.torchvision_data import SOURCES

CLASSES, EACH = 2, 6  # images of a class in every part


def image(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if level % 2 else "RGB", (40 + level, 50), 20 * level).save(path)


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def matrices(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def everything():
    """Class, number of an image in its part."""
    return [(kind, number) for kind in range(CLASSES) for number in range(EACH)]


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", ["707-320", "A 300"])
    for part, start in (("trainval", 0), ("test", 100)):
        names = [f"{start + 10 * kind + number:07d} {('707-320', 'A 300')[kind]}" for kind, number in everything()]
        text(data / f"images_variant_{part}.txt", names)
        for name in names:
            image(data / "images" / f"{name.split()[0]}.jpg")


def caltech(folder, count):
    def make(root):
        for kind in ("a", "b"):
            for number in range(1, count + 5):
                name = (
                    f"image_{number:04d}.jpg"
                    if folder.startswith("101")
                    else f"00{'ab'.index(kind) + 1}_{number:04d}.jpg"
                )
                kinds = kind if folder.startswith("101") else f"00{'ab'.index(kind) + 1}.{kind}"
                image(root / f"caltech{folder[:3]}" / folder / kinds / name, number % 3)
        if folder.startswith("101"):
            image(root / "caltech101" / folder / "BACKGROUND_Google" / "image_0001.jpg")

    return make


def cars(root):
    folder = root / "stanford_cars"
    names = np.array(["AM General Hummer", "Acura RL"])
    matrices(folder / "devkit" / "cars_meta.mat", class_names=names)
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{10 * kind + number:05d}.jpg", kind + 1) for kind, number in everything()]
        matrices(folder / file, annotations=np.array(rows, dtype=[("fname", "U9"), ("class", "u1")]))
        for name, _ in rows:
            image(folder / f"cars_{part}" / name)


def dtd(root):
    for part in ("train", "val", "test"):
        names = [f"{('banded', 'woven')[kind]}/{part}_{number}.jpg" for kind, number in everything()]
        text(root / "dtd" / "dtd" / "labels" / f"{part}1.txt", names)
        for name in names:
            image(root / "dtd" / "dtd" / "images" / name)


def flowers(root):
    folder, parts = root / "flowers-102", ("trnid", "valid", "tstid")
    count = CLASSES * EACH
    matrices(folder / "setid.mat", **{part: count * n + 1 + np.arange(count) for n, part in enumerate(parts)})
    matrices(folder / "imagelabels.mat", labels=np.array([kind + 1 for kind, _ in everything()] * 3))
    for number in range(1, 3 * count + 1):
        image(folder / "jpg" / f"image_{number:05d}.jpg")


def food(root):
    for part in ("train", "test"):
        names = {kind: [f"{kind}/{part}{number}" for number in range(EACH)] for kind in ("apple_pie", "waffles")}
        text(root / "food-101" / "meta" / f"{part}.json", [json.dumps(names)])
        for name in sum(names.values(), []):
            image(root / "food-101" / "images" / f"{name}.jpg")


def pets(root):
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        names = [(f"{('Bengal', 'pug_dog')[kind]}_{part}{number}", kind + 1) for kind, number in everything()]
        text(folder / "annotations" / f"{part}.txt", [f"{name} {label} {label} 1" for name, label in names])
        for name, _ in names:
            image(folder / "images" / f"{name}.jpg")


def sun397(root):
    text(root / "SUN397" / "ClassName.txt", ["/a/abbey", "/b/bar/indoor"])
    for kind in ("a/abbey", "b/bar/indoor"):
        for number in range(103):
            image(root / "SUN397" / kind / f"sun_{number:03d}.jpg", number % 3)


def cifar10(root):
    generator = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    text(folder / "x", [])
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": generator.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))


def cifar100(root):
    generator = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    text(folder / "x", [])
    for name in ("train", "test"):
        entry = {"data": generator.integers(0, 256, (20, 3072), np.uint8), "fine_labels": list(range(20))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind {n}" for n in range(100)]}))


# name -> what writes it, training and test images, the first class
SETS = {
    "aircraft": (aircraft, 12, 12, "707-320"),
    "caltech101": (caltech("101_ObjectCategories", 30), 60, 8, "a"),
    "caltech256": (caltech("256_ObjectCategories", 60), 120, 8, "001.a"),
    "cars": (cars, 12, 12, "AM General Hummer"),
    "cifar10": (cifar10, 50, 10, "airplane"),
    "cifar100": (cifar100, 20, 20, "kind 0"),
    "dtd": (dtd, 24, 12, "banded"),
    "flowers": (flowers, 24, 12, getattr(Flowers102, "classes", ["0"])[0]),
    "food": (food, 12, 12, "apple_pie"),
    "pets": (pets, 12, 12, "Bengal"),
    "sun397": (sun397, 100, 100, "abbey"),
}


@pytest.fixture(autouse=True)
def without_checksums(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *_: True)

    def loadmat(path, squeeze_me):  # SciPy, for files of NumPy
        return dict(np.load(path))

    scipy = SimpleNamespace(loadmat=loadmat)
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace(io=scipy))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)


def test_every_data_set_has_a_recipe():
    assert SETS.keys() == SOURCES.keys() <= RECIPES.keys()
    assert {recipe.data.dataset for recipe in RECIPES.values()} >= SOURCES.keys()


@pytest.mark.parametrize("name", SETS)
def test_files_are_parted_as_in_the_literature(tmp_path, name):
    make, training, testing, first = SETS[name]
    make(tmp_path)
    train, test, classes = load_datasets(name, tmp_path)
    assert (len(train), len(test)) == (training, testing) and classes[0] == first
    labels = np.bincount([train[number][1] for number in range(training)])
    assert len(set(labels[labels > 0])) == 1  # as many of each class
    made = loaders(train, test, batch_size=8, augmentation=RECIPES[name].data.augmentation)
    side = 32 if name.startswith("cifar") else 224
    for part in (made.train, made.test):
        images, labels = next(iter(part))
        assert images.shape == (8, 3, side, side) and int(labels.max()) < len(classes)
    if SOURCES[name].per_class:
        again, _, _ = load_datasets(name, tmp_path)
        other, _, _ = load_datasets(name, tmp_path, seed=1)
        assert again.indices == train.indices != other.indices and not {*train.indices} & {*test.indices}


def test_the_order_of_the_disk_does_not_matter(tmp_path, monkeypatch):
    sun397(tmp_path)
    train, _, _ = load_datasets("sun397", tmp_path)
    kind = torchvision.datasets.SUN397
    usual = kind.__init__

    def backwards(self, *arguments, **options):
        usual(self, *arguments, **options)
        self._image_files.reverse()
        self._labels.reverse()

    monkeypatch.setattr(kind, "__init__", backwards)
    other, _, _ = load_datasets("sun397", tmp_path)
    assert {str(train.dataset._image_files[n]) for n in train.indices} == {
        str(other.dataset._image_files[n]) for n in other.indices
    }


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_not_there_and_cannot_be_downloaded_is_said(tmp_path, monkeypatch, name):
    def refuse(self, *_, **__):
        raise OSError("no network")

    for method in ("download", "_download"):
        if hasattr(SOURCES[name].kind, method):
            monkeypatch.setattr(SOURCES[name].kind, method, refuse)
    with pytest.raises(DataError, match=r" is not in .* could not be downloaded \(no network\); put"):
        load_datasets(name, tmp_path)


def folders(root):
    for part in ("train", "test"):
        for kind, number in everything():
            image(root / part / f"00{kind}.bird" / f"{number}.jpg", number % 3)


PUBLISHED = ("cifar10", "cifar100", "caltech256", "cub200", "stanford-dogs")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pets", *PUBLISHED])
def test_a_full_size_recipe_runs_end_to_end(tmp_path, capsys, name):
    make = SETS[name][0] if name in SETS else folders
    make(tmp_path / "data")
    small = ["--arch", "resnet18", "--checkpoint", "none", "--epochs", "1", "--steps", "1", "--evaluation.steps", "1"]
    small += ["--batch-size", "12", "--evaluation.images", "4", "--workers", "0", "--data-root", str(tmp_path / "data")]
    assert cli.main(["train", "--recipe", name, "--run", str(tmp_path / "run"), *small]) == 0
    assert RunFolder(tmp_path / "run").read_result()["after"]["images"] == 4
    assert "TWINS-AT" in capsys.readouterr().out
