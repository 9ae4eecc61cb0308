"""What a training method is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.nn.wings import is_twin, twin_layers, two_wing_layers
from twins_fast.options import check_options
from twins_fast.validation import check_images, check_labels, checked_logits, indexable

Attack = Callable[..., Tensor]


class Logits(NamedTuple):
    """What the model said in train mode, float32 or float64.

    Attributes:
        adversarial: [B, classes].
        clean: [B, classes], of methods that look at clean images too.
        penalty: a term of the loss, [], that is not of these logits.
    """

    adversarial: Tensor
    clean: Tensor | None = None
    penalty: Tensor | None = None


class Beside(NamedTuple):
    """What a step looks at besides the network and its batch.

    Attributes:
        kept: what the method's ``keep`` made.
        source: images and labels of the pre-training.
    """

    kept: Any = None
    source: tuple[Tensor, Tensor] | None = None


NOTHING = Beside()


@dataclass(frozen=True)
class Method:
    """A training method: its options, what it makes of a network, its adversary and its loss.

    One step of it, on a batch that :meth:`check` has looked at::

        images -> perturb -> forward, as [frozen | adaptive] -> loss -> backward -> optimiser step

    A subclass is one file of this folder, gives itself a ``name``, and is listed in ``METHODS``.

    Attributes:
        name: by which recipes and the command line know it.
        wings: parts of the batch that have a batch norm of their own.
        needs_clean: whether the loss looks at the logits of the clean images, too.
        needs_pretrained: whether ``keep`` makes something of the pre-trained network.
        needs_source: whether a step needs images of the pre-training, and the network their head.
        dropped: children that ``prepare`` gives the network for training alone.
        takes_soft_labels: whether the loss is defined for probabilities of classes.
    """

    name: ClassVar[str]
    wings: ClassVar[int] = 1
    needs_clean: ClassVar[bool] = False
    needs_pretrained: ClassVar[bool] = False
    needs_source: ClassVar[bool] = False
    dropped: ClassVar[tuple[str, ...]] = ()
    takes_soft_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network that the method trains, made from a pre-trained one (in place)."""
        return model

    def keep(self, model: nn.Module, attack: Any) -> Any:
        """What a step needs besides the network, made of the prepared one before the first step; it is never saved.

        A run that resumes makes it again, of the pre-trained network if ``needs_pretrained``.
        """
        return None

    def length_of_warmup(self, steps_per_epoch: int) -> int:
        """How many batches :meth:`warm_up` is given before the first step."""
        return 0

    def warm_up(self, attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Learn from a batch whatever is to be known before training; no parameter moves."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those that the optimiser moves."""
        return list(model.parameters())

    def attack(self, model: nn.Module, **options: Any) -> Attack | None:
        """The method's adversary against ``model``, with ``options`` of :class:`twins_fast.PGD`; None for none."""
        raise NotImplementedError

    def check(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Require a batch that the model and the method can take; return the largest label, [] (-1 if none).

        Args:
            model: in train mode, with two-wing layers in mix mode if the method has two wings.
            images: [B, C, H, W] floating point in [0, 1].
            labels: [B] int64.

        Raises:
            TypeError, ValueError: bad images or labels, too few of them, a model whose wings do not fit. Values on a
                GPU are not waited for: what is wrong with them is raised by a later check.
        """
        check_images(images, model)
        largest_label = check_labels(labels, images)
        if labels.is_floating_point():
            self.check_soft_labels("labels that are probabilities")
        self._check_wings(model)
        if len(images) < self.wings:
            raise ValueError(f"method {self.name!r} needs at least {self.wings} image(s), got {len(images)}")
        return largest_label

    def perturb(
        self,
        attack: Attack,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        largest_label: Tensor,
        x_init: Tensor | None = None,
    ) -> Tensor:
        """The adversarial images [B, C, H, W] of a checked batch."""
        if type(attack) is PGD and attack.model is model:
            return attack.perturb(images, labels, largest_label, x_init)
        return attack(images, labels, x_init=x_init)

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        largest_label: Tensor,
        beside: Beside = NOTHING,
    ) -> Logits:
        """Run the model on what the loss needs, adversarial images first: running statistics depend on the order."""
        trained_on = checked_logits(model(adversarial), len(images), largest_label)
        return Logits(trained_on, checked_logits(model(images), len(images), None) if self.needs_clean else None)

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        """The training loss, a scalar; cross-entropy if a method does not say otherwise."""
        return self._cross_entropy(logits.adversarial, labels)

    def metrics(self, logits: Logits, labels: Tensor) -> dict[str, Tensor]:
        """Detached: accuracies in [0, 1] on the images that were trained on, and the wings' losses if there are two."""
        return {"accuracy": correct(logits, labels).mean()}

    def parts(self, rows: int) -> list[tuple[float, slice]]:
        """The weight and the rows of each wing's part of the batch."""
        return [(1.0, slice(0, rows))]

    @classmethod
    def check_soft_labels(cls, what: str) -> None:
        """Refuse what makes probabilities of labels if the loss needs one class for each image."""
        if not cls.takes_soft_labels:
            raise ValueError(f"the loss of method {cls.name!r} needs one class for each image: it cannot have {what}")

    def _both(self, logits: Logits) -> tuple[Tensor, Tensor]:
        """The logits of the adversarial and of the clean images."""
        if logits.clean is None:
            raise ValueError(f"method {self.name!r} needs the logits of the clean images, too")
        return logits.adversarial, logits.clean

    def _penalty(self, logits: Logits) -> Tensor:
        if logits.penalty is None:
            raise ValueError(f"method {self.name!r} has a term that its forward computes")
        return logits.penalty

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A mean over the rows of each part, weighted and summed."""
        labels = indexable(labels, logits.shape[1])
        return total(weight * F.cross_entropy(logits[part], labels[part]) for weight, part in self.parts(len(labels)))

    def _check_wings(self, model: nn.Module) -> None:
        layers = two_wing_layers(model)
        mixing = [layer.chosen_wing() == "mix" for layer in layers]
        if self.wings == 1 and any(mixing):
            usual = "adaptive" if is_twin(model) else "main"
            raise ValueError(
                f"method {self.name!r} sends the whole batch through one batch norm, but the model's two-wing layers "
                f'are in mix mode; use revert_twin_bn, or wings(model, "{usual}")'
            )
        if self.wings == 1:
            return
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(f"method {self.name!r} cannot use nn.DataParallel: each replica would split its own rows")
        if len(twin_layers(model)) < len(layers):
            raise ValueError(f"method {self.name!r} needs a frozen wing, but the model's layout has an auxiliary one")
        if not (layers and all(mixing)):
            state = (
                "has no two-wing layers (see convert_twin_bn)" if not layers else "is not in mix mode (call train())"
            )
            raise ValueError(f"method {self.name!r} needs two-wing layers in mix mode, but the model {state}")


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one term or more."""
    return reduce(operator.add, terms)


def correct(logits: Logits, labels: Tensor) -> Tensor:
    """[B] float: 1 where the logits that were trained on are right."""
    labels = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits.adversarial.detach().argmax(1) == labels).float()
