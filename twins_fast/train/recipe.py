"""A recipe: every hyper-parameter of a run, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

from tyro.conf import Suppress, arg

from twins_fast.attacks.pgd import ENGINES, NORMS
from twins_fast.methods import METHODS, Method, TwinsAT
from twins_fast.models import ARCHITECTURES
from twins_fast.options import check_options, from_plain, known, to_plain, updated
from twins_fast.train.datasets import DATASETS
from twins_fast.train.field_types import Fraction, Integers, Names, OptionalInteger, Pixels, short
from twins_fast.train.loaders import AUGMENTATIONS
from twins_fast.train.old_recipe import from_flat, is_flat
from twins_fast.train.trackers import TRACKERS
from twins_fast.validation import check_choice, check_radius

M = TypeVar("M", bound=Method)
AMP = ("none", "bf16", "fp16")


class RecipeError(ValueError):
    """An unknown recipe, or a field with a value that makes no sense."""


def _check_names(kind: str, field: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        check_choice(kind, name, known)
    if len(set(names)) < len(names):
        raise ValueError(f"{field} must name each {kind} once, got {', '.join(names)}")


@dataclass(frozen=True)
class Data:
    """The images of a run, and how they are fed."""

    dataset: Literal[tuple(DATASETS)]
    """Which images; --data-root says where they are."""
    classes: Names = ()
    """Subset of the classes of an .npz file, in label order; empty for all."""
    source: str = ""
    """Images of the pre-training, which joint needs: an .npz file, or a folder with train/CLASS/* images."""
    source_classes: Names = ()
    """Subset of the classes of an .npz file with such images, in the order of the pre-trained head; empty for all."""
    augmentation: Literal[tuple(AUGMENTATIONS)] = "cifar"
    """Of training images: none; crop and flip of 32 x 32 pixels; resize, crop and flip to 224 x 224."""
    batch_size: Annotated[int, short("--batch-size")] = 128
    """Images of a training step; half of them for each wing."""
    workers: Annotated[OptionalInteger, short("--workers")] = None
    """Processes that load images, 0 for the training process itself; none for as many as there are cores, 4 at most."""

    def __post_init__(self):
        check_options(self, least={"batch_size": 2})


@dataclass(frozen=True)
class Network:
    """The network that is fine-tuned."""

    arch: Annotated[str, arg(aliases=("--arch",), metavar="{" + ",".join(ARCHITECTURES) + "}")] = "resnet50"
    """Name of a network; twins_fast.models.register adds one."""
    checkpoint: Annotated[str, arg(aliases=("--checkpoint",), metavar="FILE|embedded|none")] = ""
    """Pre-trained network; none for random weights, which two-wing methods train from only if it is said."""
    init_head: Literal["random", "adversarial-probe"] = "random"
    """Where the head starts; adversarial-probe trains it alone first, into RUN/head (RoLI, arXiv 2312.05716)."""
    probe_epochs: int = 20
    """Epochs of the adversarial probe."""
    probe_lr: Fraction = 1e-2
    """Learning rate of the adversarial probe, from the first to the last epoch."""
    upsample: OptionalInteger = None
    """Side in pixels to which the network upsamples its images; none for their own."""
    channels_last: bool = False
    """Whether images and network are channels-last in memory."""

    def __post_init__(self):
        check_options(self, least={"upsample": 1, "probe_epochs": 1})
        check_choice("arch", self.arch, ARCHITECTURES)


@dataclass(frozen=True)
class Attack:
    """PGD in training; evaluation shares its norm, radius and engine. Pixels are in [0, 1]."""

    norm: Literal[tuple(NORMS)] = "linf"
    """Norm of the ball around the clean images."""
    eps: Annotated[Pixels, short("--eps")] = 8 / 255
    """Radius of the ball."""
    alpha: Pixels = 2 / 255
    """Length of a step."""
    steps: Annotated[int, short("--steps")] = 10
    """Steps of the attack in training."""
    engine: Literal[tuple(ENGINES)] = "auto"
    """Planned attack steps, plain PyTorch, or whichever is known to be right and faster."""
    chunk_size: OptionalInteger = None
    """Images that go through all attack steps at once; by default what a CPU's cache holds, all on a GPU."""

    def __post_init__(self):
        check_options(self)
        check_radius(self.norm, self.eps)


@dataclass(frozen=True)
class Optimizer:
    """SGD and its learning rates."""

    epochs: Annotated[int, short("--epochs")] = 60
    """Passes over the training images."""
    lr: Annotated[Fraction, short("--lr")] = 3e-3
    """Learning rate, the highest one of the run."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-5
    """Weight decay of SGD, on every parameter."""
    schedule: Literal["multistep", "onecycle", "auto"] = "multistep"
    """Learning rate: divided at milestones; linear up from and down to zero; halved when validation stops improving."""
    milestones: Integers = (30, 50)
    """Epochs after which multistep multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor of multistep."""
    warmup: float = 0.3
    """Part of the run, in (0, 1), in which onecycle rises."""
    patience: int = 2
    """Evaluations in a row without a more robust network after which auto halves the learning rate."""

    def __post_init__(self):
        check_options(self, least={"epochs": 1, "patience": 1})
        if not 0 < self.warmup < 1:
            raise ValueError(f"warmup must be in (0, 1), got {self.warmup!r}")


@dataclass(frozen=True)
class Regularisation:
    """What goes around the method, whichever it is; 0 leaves it out."""

    label_smoothing: float = 0.0
    """Part of each label, in [0, 1), that the loss spreads over all classes (the attack does not)."""

    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Each image mixed with another one before the attack (arXiv 1710.09412, 1905.04899), where the loss allows it."""
    mix_alpha: float = 1.0
    """Both parameters of the Beta distribution of the mixing ratio."""
    awp: float = 0.0
    """Relative length by which weights are moved to where the loss is worst, such as 0.005 (AWP, NeurIPS 2020)."""
    awp_warmup: int = 0
    """Epochs before weights are moved."""
    ema: float = 0.0
    """Decay, in [0, 1), of a moving average of the weights, which is evaluated instead, such as 0.995."""

    def __post_init__(self):
        check_options(self)
        for name in ("label_smoothing", "ema"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be less than 1, got {getattr(self, name)}")
        if self.mix_alpha == 0:
            raise ValueError("mix_alpha must be greater than 0, got 0")


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on clean images and under PGD without a random start."""

    alpha: Pixels = 2 / 255
    """Length of an attack step, pixels in [0, 1]."""
    steps: int = 10
    """Steps of the attack."""
    choose_on: Literal["validation", "test"] = "validation"
    """Images on which the best network is chosen: training images set apart, or the test images as published."""
    validation_part: float = 0.05
    """Part of the training images that is set apart for validation."""
    images: int = 0
    """Images of an evaluation, chosen by the seed; 0 for all."""
    every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    before: bool = False
    """Whether the network is evaluated before the first step, too."""

    def __post_init__(self):
        check_options(self, least={"every": 1})
        if not 0 < self.validation_part < 1:
            raise ValueError(f"validation_part must be in (0, 1), got {self.validation_part!r}")


@dataclass(frozen=True)
class Run:
    """What concerns the run as a whole."""

    seed: Annotated[int, short("--seed")] = 0
    """The trajectory depends on it and on nothing else that is random."""
    amp: Annotated[Literal[AMP], short("--amp")] = "none"
    """Half-precision dtype of autocast."""
    baselines: Names = ()
    """Methods to train on the same budget, for one table; the run's own method is left out."""
    sync_statistics: bool = False
    """Whether batch norms take their statistics over the batches of all processes, under torchrun."""

    def __post_init__(self):
        check_options(self)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {self.seed}")
        _check_names("method", "baselines", self.baselines, METHODS)


@dataclass(frozen=True)
class Log:
    """What is recorded besides each step's loss and accuracy; a resumed run may record something else."""

    dynamics: int = 20
    """Steps between two measurements of weights, gradients and wings (docs/dynamics.md); 0 for none."""
    to: Annotated[Names, short("--log")] = ()
    """Where the figures go, too: tensorboard, wandb."""

    def __post_init__(self):
        check_options(self)
        _check_names("tracker", "to", self.to, TRACKERS)


@dataclass(frozen=True)
class Recipe(Generic[M]):
    """One run; the defaults are the published ones (arXiv 2303.11135)."""

    name: Suppress[str]
    data: Data
    method: M = field(default_factory=TwinsAT)
    network: Network = Network()
    attack: Attack = Attack()
    optimizer: Optimizer = Optimizer()
    regularisation: Regularisation = Regularisation()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()
    log: Log = Log()

    def __post_init__(self):
        if self.optimizer.schedule == "auto" and self.evaluation.choose_on == "test":
            raise ValueError("schedule 'auto' looks at validation images, but evaluation.choose_on is 'test'")
        soft = {
            "label smoothing": self.regularisation.label_smoothing,
            "mixed images": self.regularisation.mix != "none",
        }
        for what in (name for name, wanted in soft.items() if wanted):
            for method in (self.method, *(METHODS[name] for name in self.run.baselines)):
                method.check_soft_labels(what)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: a table for each section."""
        method = {"method": {"name": self.method.name, **to_plain(self.method)}}
        return {"name": self.name} | {name: to_plain(getattr(self, name)) for name in SECTIONS} | method

    def fields(self) -> dict[str, Any]:
        """Dotted names -> plain values."""
        tables = self.to_dict()
        name = {"name": tables.pop("name")}
        return name | {f"{section}.{k}": value for section, fields in tables.items() for k, value in fields.items()}

    @staticmethod
    def from_dict(tables: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; what is missing takes its default. Reads version 0.1's flat form, too.

        Raises:
            RecipeError: unknown sections or fields, or a value that makes no sense.
        """
        if is_flat(tables):
            tables = from_flat(tables)
        name = tables.get("name", "unnamed")
        if not isinstance(name, str):
            raise RecipeError(f"the name of a recipe must be a string, got {name!r}")
        _check_sections(tables)
        try:
            sections = {k: from_plain(cls, tables[k], k) for k, cls in SECTIONS.items() if k in tables or k == "data"}
            recipe = Recipe(name, **sections)
        except KeyError:
            raise RecipeError(f"recipe {name!r} lacks data.dataset") from None
        except ValueError as error:
            raise RecipeError(f"recipe {name!r}: {error}") from None
        return recipe.replaced(method=tables["method"]) if "method" in tables else recipe

    def replaced(self, **sections: Any) -> Recipe:
        """A copy with some fields replaced: ``recipe.replaced(method="at", optimizer={"lr": 1e-3})``.

        Args:
            sections: name of a section -> a table of fields. ``method`` may be a name, which keeps the options
                that both methods have, or a table with or without a ``name``. ``name`` is the recipe's own.

        Raises:
            RecipeError: as in :meth:`from_dict`.
        """
        _check_sections(sections)
        try:
            new = {"name": sections.get("name", self.name)}
            new |= {k: updated(getattr(self, k), table, k) for k, table in sections.items() if k in SECTIONS}
            if "method" in sections:
                new["method"] = _replaced_method(self.method, sections["method"])
            return dataclasses.replace(self, **new)
        except ValueError as error:
            raise RecipeError(f"recipe {self.name!r}: {error}") from None


SECTIONS = {
    "data": Data,
    "network": Network,
    "attack": Attack,
    "optimizer": Optimizer,
    "regularisation": Regularisation,
    "evaluation": Evaluation,
    "run": Run,
    "log": Log,
}


def _check_sections(tables: Mapping[str, Any]) -> None:
    unknown = sorted(set(tables) - {"name", "method", *SECTIONS})
    if unknown:
        raise RecipeError(f"unknown recipe sections: {', '.join(unknown)}; choose from method, {', '.join(SECTIONS)}")


def _replaced_method(method: Method, wanted: str | Mapping[str, Any]) -> Method:
    if not isinstance(wanted, str | Mapping):
        raise ValueError(f"method must be a name or a table of fields, got {wanted!r}")
    table = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    name = table.pop("name", method.name)
    check_choice("method", name, METHODS)
    return updated(known(METHODS[name], **dataclasses.asdict(method)), table, "method")
