"""The recipes that come with the package."""

from __future__ import annotations

from typing import Any

from twins_fast.methods import AT, TwinsAT
from twins_fast.train.recipe import Attack, Data, Evaluation, Network, Optimizer, Recipe, RecipeError, Run
from twins_fast.train.torchvision_data import SOURCES

SOURCE_CLASSES = ("airplane", "automobile", "bird", "cat", "horse")
TARGET_CLASSES = ("ship", "truck", "dog", "deer", "frog")


def _cifar(name: str) -> Recipe:
    return Recipe(name, Data(name), network=Network(upsample=224))


def _high_resolution(name: str, dataset: str) -> Recipe:
    return Recipe(
        name,
        Data(dataset, augmentation="high-resolution"),
        TwinsAT(frozen_weight=0.4),
        optimizer=Optimizer(weight_decay=1e-3),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Learning rate, weight decay and the frozen wing's weight of cifar10 and caltech256 are published; the other
        # data sets' are not, and take those of the nearer of the two.
        _cifar("cifar10"),
        _cifar("cifar100"),
        *(_high_resolution(name, name) for name in SOURCES if not name.startswith("cifar")),
        *(_high_resolution(name, "folder") for name in ("birdsnap", "cub200", "stanford-dogs")),
        Recipe(
            "mini",
            Data("embedded", batch_size=64, workers=0),
            network=Network("cifar-resnet18-w16", checkpoint="embedded"),
            optimizer=Optimizer(epochs=5, lr=1e-2, milestones=(4,)),
            evaluation=Evaluation(choose_on="test", before=True, every=2),
            run=Run(baselines=("at",)),
        ),
        Recipe(
            "mini-pretrain",
            Data("npz", classes=SOURCE_CLASSES, workers=0),
            AT(),
            Network("cifar-resnet18-w16", channels_last=True),
            Attack(alpha=4 / 255, steps=3),
            Optimizer(epochs=24, lr=0.2, weight_decay=5e-4, schedule="onecycle"),
            evaluation=Evaluation(choose_on="test", images=500),
            run=Run(amp="bf16"),
        ),
    )
}


def get_recipe(name: str, **sections: Any) -> Recipe:
    """A recipe by name, with fields replaced as in :meth:`Recipe.replaced`.

    Raises:
        RecipeError: unknown name, or a field with a value that makes no sense.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(sorted(RECIPES))}")
    return RECIPES[name].replaced(**sections)
