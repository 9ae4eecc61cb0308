"""Recipes: every hyper-parameter of a run, frozen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from twins_fast.attacks.pgd import ADVERSARIES, ENGINES, NORMS
from twins_fast.methods import METHODS
from twins_fast.models import ARCHITECTURES
from twins_fast.validation import check_choice, check_not_negative

SCHEDULES = ("multistep", "onecycle")
AUGMENTATIONS = ("none", "cifar", "high-resolution")
AMP = (None, "bf16", "fp16")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOURCE_CLASSES = ("airplane", "automobile", "bird", "cat", "horse")
TARGET_CLASSES = ("ship", "truck", "dog", "deer", "frog")


class RecipeError(ValueError):
    """An unknown recipe, or a field with a value that makes no sense."""


@dataclass(frozen=True)
class Recipe:
    """One run. Pixel quantities (eps, alpha) are in units of [0, 1]; the defaults are the published ones."""

    name: str
    dataset: str  # a name of twins_fast.train.data.DATASETS
    arch: str = "resnet50"
    checkpoint: str | None = None  # pre-trained network: a file, "embedded", or None for random weights
    method: str = "twins-at"
    beside: tuple[str, ...] = ()  # methods to run on the same budget, for one table
    classes: tuple[str, ...] = ()  # subset of an .npz of CIFAR-10, in label order; empty for all
    epochs: int = 60
    batch_size: int = 128
    lr: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 1e-5
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (30, 50)  # epochs, for multistep
    lr_gamma: float = 0.1
    warmup: float = 0.3  # fraction of the run, for onecycle
    twins_lambda: float = 1.0
    trades_beta: float = 6.0
    adversary: str = "ce"
    norm: str = "linf"
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    eval_alpha: float = 2 / 255
    eval_steps: int = 10
    eval_images: int = 0  # test images per evaluation; 0 for all
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    eval_before: bool = False  # also evaluate the network before the first step
    augmentation: str = "cifar"
    upsample: int | None = None
    amp: str | None = None
    engine: str = "auto"  # of the attack
    channels_last: bool = False
    seed: int = 0
    workers: int = 4

    def __post_init__(self):
        try:
            check_choice("arch", self.arch, ARCHITECTURES)
            for method in (self.method, *self.beside):
                check_choice("method", method, METHODS)
            check_choice("schedule", self.schedule, SCHEDULES)
            check_choice("adversary", self.adversary, ADVERSARIES)
            check_choice("norm", self.norm, NORMS)
            check_choice("augmentation", self.augmentation, AUGMENTATIONS)
            check_choice("amp", self.amp, AMP)
            check_choice("engine", self.engine, ENGINES)
            numbers = (
                "epochs batch_size lr momentum weight_decay lr_gamma twins_lambda trades_beta "
                "eps alpha steps eval_alpha eval_steps eval_images eval_every seed workers"
            )
            check_not_negative(**{name: getattr(self, name) for name in numbers.split()})
        except ValueError as error:
            raise RecipeError(f"recipe {self.name!r}: {error}") from None
        others = [other for other in self.beside if other != self.method]
        if len(set(others)) < len(self.beside):
            raise RecipeError(
                f"recipe {self.name!r}: beside must name methods other than {self.method!r}, each once, "
                f"got {', '.join(self.beside)}"
            )
        if self.upsample is not None and self.upsample < 1:
            raise RecipeError(f"recipe {self.name!r}: upsample must be at least 1, got {self.upsample}")
        for field, least in (("epochs", 1), ("eval_every", 1), ("batch_size", 2)):
            if getattr(self, field) < least:
                raise RecipeError(f"recipe {self.name!r}: {field} must be at least {least}, got {getattr(self, field)}")
        if not 0 < self.warmup < 1:
            raise RecipeError(f"recipe {self.name!r}: warmup must be in (0, 1), got {self.warmup!r}")

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_dict(fields: dict) -> Recipe:
        """The inverse of :meth:`to_dict`; unknown fields are an error."""
        known = {field.name for field in dataclasses.fields(Recipe)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise RecipeError(f"unknown recipe fields: {', '.join(unknown)}")
        if fields.get("adversary") == "published":  # in files of version 0.1
            fields = {**fields, "adversary": "ce"}
        return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


# lr, weight decay and lambda of cifar10 and caltech256 are published; the other data sets' are not,
# and take those of the nearer of the two.
_CIFAR = {"upsample": 224, "augmentation": "cifar"}
_HIGH_RESOLUTION = {"augmentation": "high-resolution", "weight_decay": 1e-3, "twins_lambda": 0.4}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("cifar10", "cifar10", **_CIFAR),
        Recipe("cifar100", "cifar100", **_CIFAR),
        Recipe("caltech256", "caltech256", **_HIGH_RESOLUTION),
        Recipe("cub200", "folder", **_HIGH_RESOLUTION),
        Recipe("stanford-dogs", "folder", **_HIGH_RESOLUTION),
        Recipe(
            "mini",
            "embedded",
            arch="cifar-resnet18-w16",
            checkpoint="embedded",
            beside=("at",),
            eval_before=True,
            eval_every=4,
            epochs=4,
            batch_size=64,
            lr=1e-2,
            milestones=(3,),
            workers=0,
        ),
        Recipe(
            "mini-pretrain",
            "npz",
            arch="cifar-resnet18-w16",
            method="at",
            classes=SOURCE_CLASSES,
            epochs=15,
            lr=0.2,
            weight_decay=5e-4,
            schedule="onecycle",
            alpha=4 / 255,
            steps=3,
            eval_images=500,
            channels_last=True,
            workers=0,
        ),
    )
}


def get_recipe(name: str, **overrides) -> Recipe:
    """A recipe by name with some fields replaced."""
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(sorted(RECIPES))}")
    return dataclasses.replace(RECIPES[name], **overrides)
