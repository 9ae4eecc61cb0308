"""The linear head of a network, and the network with another one in its place."""

from __future__ import annotations

import copy

from torch import Tensor, nn

HEAD, SOURCE_HEAD = "fc_downstream", "fc"  # that of the task at hand, and that of the pre-training where it is kept


def head_name(model: nn.Module) -> str:
    """The module that is named ``fc_downstream``, or else the last ``nn.Linear``.

    Raises:
        ValueError: there is neither.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = [name for name in names if name.rpartition(".")[2] == HEAD]
    if not names:
        raise ValueError("the network has no nn.Linear that could be its head")
    return (named or names)[-1]


def head_of(model: nn.Module) -> nn.Module:
    """The head itself."""
    return model.get_submodule(head_name(model))


def with_head(model: nn.Module, head: nn.Module) -> nn.Module:
    """The network with ``head`` in place of its own; everything else is shared, and neither is changed."""
    return _with(model, head_name(model).split("."), head)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head is given, [B, ...]."""
    found: Tensor = with_head(model, nn.Identity())(images)
    return found


def _with(module: nn.Module, path: list[str], head: nn.Module) -> nn.Module:
    if not path:
        return head
    other = copy.copy(module)
    other._modules = dict(module._modules)
    other._modules[path[0]] = _with(module.get_submodule(path[0]), path[1:], head)
    return other
