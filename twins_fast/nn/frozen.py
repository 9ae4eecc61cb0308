"""What the frozen wing holds other than a copy of the pre-trained batch norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from twins_fast.nn.layers import TwinBatchNorm2d
from twins_fast.nn.wings import twin_layers, wings


def share_affine(model: nn.Module) -> None:
    """Let the frozen wing use the very weight and bias of the adaptive one."""
    for layer in twin_layers(model):
        layer.main_bn.weight, layer.main_bn.bias = layer.weight, layer.bias


def shuffle_statistics(model: nn.Module) -> None:
    """Give each channel of the frozen wing the statistics of another one, drawn from PyTorch's generator."""
    for layer in twin_layers(model):
        mean, variance = (layer.main_bn.get_buffer(name) for name in ("running_mean", "running_var"))
        order = torch.randperm(len(mean)).to(mean.device)
        mean.copy_(mean[order])
        variance.copy_(variance[order])


def forget_statistics(model: nn.Module) -> None:
    """Let the next batch that the frozen wing learns from be its first one."""
    for layer in twin_layers(model):
        layer.main_bn.get_buffer("num_batches_tracked").zero_()


@contextmanager
def frozen_wing_learns(model: nn.Module) -> Iterator[None]:
    """Inside the block batches in train mode are normalised by their own statistics; the frozen wing takes their mean.

    All rows go through the adaptive wing's weight and bias; its statistics stay as they are.
    """
    layers = twin_layers(model)
    momenta = [layer.momentum for layer in layers]
    with wings(model, "adaptive"):
        try:
            for layer in layers:
                _exchange_statistics(layer)
                layer.momentum = None  # a cumulative average
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                _exchange_statistics(layer)
                layer.momentum = momentum


def _exchange_statistics(layer: TwinBatchNorm2d) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        own, frozen = getattr(layer, name), getattr(layer.main_bn, name)
        setattr(layer, name, frozen)
        setattr(layer.main_bn, name, own)
