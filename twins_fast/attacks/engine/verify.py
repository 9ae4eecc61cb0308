"""Does a plan compute its model? Looked at on one or two images before its first use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.attacks.engine.program import Program

DIFFERENT = 0.05  # relative to what the model gives: a plan that does not compute the model


def agrees(program: Program, model: nn.Module, images: Tensor) -> bool:
    """Whether plan and model give the same logits and gradients on one or two of ``images``; compared once.

    In float32 and with the PyTorch executor, far wider than roundoff: this finds what the capture did not see.
    """
    count = min(len(images), 2)
    if count in program.verified or count == 0:
        return True
    program.verified.add(count)
    device = program.executor.device
    probe = Program(program.plan, program.nodes, model, program.shape, TorchExecutor(torch.float32, device))
    probe._largest = 1  # rows at once: they must not see each other
    x = images[:count].detach().contiguous()
    direction = torch.randn(count, program.classes, generator=torch.Generator().manual_seed(0)).to(device)
    found: list[Tensor] = []

    def gradient_of(logits: Tensor, rows: slice) -> Tensor:
        found.append(logits.clone())
        return direction[rows]

    def step(prepare, x, clean, gradient, nan, out):
        x.copy_(prepare.gradient(x, gradient))

    with torch.autocast(device.type, enabled=False):
        with torch.no_grad():
            probe.fold(model)
            gradient = probe.attack(x, x, 1, gradient_of, step)
        with torch.enable_grad():
            pixels = x.clone().requires_grad_()
            logits = model(pixels)
            if logits.shape != direction.shape:
                return False
            (expected,) = torch.autograd.grad((logits * direction).sum(), pixels)
    return _close(torch.cat(found), logits.detach()) and _close(gradient, expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Alike in direction and length, NaN apart."""
    found, expected = (t.nan_to_num(0, 0, 0).double().flatten() for t in (found, expected))
    return bool((found - expected).norm() <= DIFFERENT * expected.norm() + 1e-6)
