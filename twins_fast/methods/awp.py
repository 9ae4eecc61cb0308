"""Adversarial weight perturbation: the loss is taken where the weights are worst nearby."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def perturb_weights(
    model: nn.Module,
    loss: Callable[[], Tensor],
    gamma: float,
    average: Callable[[list[Tensor]], None] = lambda gradients: None,
) -> Callable[[], None]:
    """Move every weight w by gamma * ||w|| * g / ||g||, g being its gradient of the loss (Wu et al., NeurIPS 2020).

    As in the authors' code: layer by layer, tensors of one dimension left out, and running statistics see nothing of
    the forward pass that finds g.

    Args:
        model: whose trained weights move, in place.
        loss: of one forward pass; its scale does not matter.
        gamma: relative length.
        average: makes the gradients, in place, those of all processes.

    Returns:
        a function that puts the weights back, to the last bit.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() > 1]
    buffers = list(model.buffers())
    statistics = [buffer.clone() for buffer in buffers]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    average([gradient for gradient in gradients if gradient is not None])
    with torch.no_grad():
        for buffer, value in zip(buffers, statistics, strict=True):
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                length = gradient.norm()
                move = gamma * weight.norm() / length * gradient
                weight.add_(torch.where((length > 0) & length.isfinite(), move, 0.0))
    torch.clear_autocast_cache()  # which may be somebody else's, and holds old weights

    def restore() -> None:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        torch.clear_autocast_cache()

    return restore
