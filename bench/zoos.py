"""The networks of torchvision, timm and RobustBench's zoo, with random weights."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bench.children import Limits, alone
from bench.environments import environment, folder_of
from bench.harness import PARTIAL
from bench.third_party import library
from bench.workloads import CLASSES

ENVIRONMENT = "coverage-env"  # RobustBench as pip installs it, with the timm that it asks for
BATCH = 4  # images whose statistics the batch norms take


@dataclass(frozen=True)
class Zoo:
    """Networks of one package.

    Attributes:
        names: all that it has.
        build: (name) -> the network, of :data:`CLASSES` classes where it can be told so, and the side of its images.
        ours: whether the package is one of this project's; others are installed into :data:`ENVIRONMENT`.
    """

    names: Callable[[], list[str]]
    build: Callable[[str], tuple[nn.Module, int]]
    ours: bool = True


def _torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    side = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return models.get_model(name, weights=None, num_classes=CLASSES), side


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm(name: str) -> tuple[nn.Module, int]:
    import timm

    model = timm.create_model(name, num_classes=CLASSES)
    return model, model.pretrained_cfg["input_size"][-1]


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _robustbench_models() -> dict[str, Callable[[], nn.Module]]:
    """Builders; as RobustBench's ``load_model``, timm's registry comes before its own table."""
    import timm

    result = {}
    for dataset, threats in library("robustbench.model_zoo.models").model_dicts.items():
        for threat, models in threats.items():
            for name, entry in models.items():
                registered = f"{name}_{dataset.value}_{threat.value}".lower().replace("-", "_")
                build = (lambda r=registered: timm.create_model(r)) if timm.is_model(registered) else entry["model"]
                result[f"{dataset.value}/{threat.value}/{name}"] = build
    return result


def _robustbench(name: str) -> tuple[nn.Module, int]:
    return _robustbench_models()[name](), 224 if name.startswith("imagenet") else 32


ZOOS = {
    "torchvision": Zoo(_torchvision_names, _torchvision),
    "robustbench": Zoo(lambda: list(_robustbench_models()), _robustbench, ours=False),
    "timm": Zoo(_timm_names, _timm),
}


def interpreter(zoo: str) -> Path:
    """The Python that has the zoo, which for one that is not ours is made here."""
    return Path(sys.executable) if ZOOS[zoo].ours else environment(ENVIRONMENT, zoo)


def has(zoo: str) -> bool:
    """Whether this Python has the zoo."""
    return ZOOS[zoo].ours or Path(sys.prefix) == folder_of(ENVIRONMENT)


def version(zoo: str) -> str:
    return importlib.metadata.version(zoo)


@dataclass(frozen=True)
class Entry:
    """A network of the catalogue; one that cannot be built has no parameters and is a family of its own."""

    name: str
    parameters: int
    family: str


def catalogue(zoo: str) -> list[Entry]:
    """All networks of a zoo. Those whose modules are of the same types are a family."""
    entries = []
    for name in ZOOS[zoo].names():
        model = _without_memory(zoo, name)
        types = (
            {f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()} if model else ()
        )
        parameters = sum(parameter.numel() for parameter in model.parameters()) if model else 0
        entries.append(Entry(name, parameters, " ".join(sorted(types)) or name))
    return entries


def _without_memory(zoo: str, name: str) -> nn.Module | None:
    for device in ("meta", "cpu"):  # some cannot be built without their values
        try:
            with torch.device(device):
                return ZOOS[zoo].build(name)[0]
        except Exception:
            continue
    return None


def kept_catalogue(zoo: str) -> list[Entry]:
    """The catalogue, which takes minutes, from the file of an earlier run with the same packages."""
    file = PARTIAL / f"catalogue-{'-'.join([zoo, *map(version, ('torchvision', 'timm', zoo))])}.json"
    if not file.exists():
        entries = alone(Limits(3600, 16), catalogue, zoo)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([vars(entry) for entry in entries], indent=1) + "\n")
    return [Entry(**entry) for entry in json.loads(file.read_text())]


def smallest(entries: list[Entry]) -> dict[str, int]:
    """The network with the fewest parameters of each family, and how many it stands for."""
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        families.setdefault(entry.family, []).append(entry)
    return {min(family, key=lambda entry: entry.parameters).name: len(family) for family in families.values()}


def enliven(model: nn.Module, images: Tensor) -> nn.Module:
    """Make a fresh network one in which nothing vanishes and little is near zero; ends in eval mode.

    Batch norms take the statistics of ``images``. Zeros and tiny scales, by which fresh networks switch branches off,
    are drawn. Biases keep inputs of ReLUs away from zero, where roundoff alone decides about the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() and parameter.is_floating_point() and parameter.min() == parameter.max():
                if parameter.squeeze().dim() > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                elif "bias" in name.rpartition(".")[2]:
                    parameter.normal_(0, 0.1, generator=generator)
                else:
                    parameter.uniform_(0.5, 1.5, generator=generator)
        model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.3, 0.6, generator=generator)
                sign = torch.empty_like(norm.bias).uniform_(-0.5, 1, generator=generator).sign()
                norm.bias.uniform_(1.5, 2, generator=generator).mul_(sign)
            norm.train().momentum = 1.0
        if norms:
            model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())  # dead channels blow up
    return model.eval()
