"""The two-wing layers that a module calls itself, and the containers through which it reaches them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from twins_fast.nn.layers import TwoWingBatchNorm2d

Path = tuple[str, ...]


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward calls two-wing layers, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, (TwoWingBatchNorm2d, torch.jit.ScriptModule)) or _is_container(module):
            continue
        if twin_children(module):
            yield name, module


def twin_children(module: nn.Module) -> dict[Path, TwoWingBatchNorm2d]:
    """The two-wing layers that ``module`` calls itself, a shared one under its first path."""
    first_paths: dict[TwoWingBatchNorm2d, Path] = {}
    for path, container in containers(module):
        for name, child in container._modules.items():
            if isinstance(child, TwoWingBatchNorm2d):
                first_paths.setdefault(child, (*path, name))
    return {path: layer for layer, path in first_paths.items()}


def _is_container(module: nn.Module) -> bool:
    """Whether a module, such as ModuleList, has no forward of its own."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is nn.Module.forward


def containers(module: nn.Module, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """``module`` and the containers through which it reaches children, with their paths."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and _is_container(child):
            yield from containers(child, (*path, name))


def children(module: nn.Module) -> list[tuple[Path, list[tuple[str, int | None]]]]:
    """The names of all children, and which of them are the same module."""
    first: dict[int, int] = {}
    return [
        (
            path,
            [
                (name, None if child is None else first.setdefault(id(child), len(first)))
                for name, child in container._modules.items()
            ],
        )
        for path, container in containers(module)
    ]


def at(module: nn.Module | None, path: Path) -> nn.Module | None:
    """The descendant at ``path``; None if there is none."""
    for name in path:
        module = module and module._modules.get(name)
    return module
