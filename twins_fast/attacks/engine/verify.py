"""Whether a plan computes its model, checked on one or two images before its first use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.attacks.engine.nodes import NotCaptured, in_one_line
from twins_fast.attacks.engine.program import Program
from twins_fast.nn.guards import random_numbers_restored

DIFFERENT = 0.05  # relative L2 distance from the model's results beyond which a plan is rejected


def agrees(program: Program, model: nn.Module, images: Tensor) -> bool:
    """Whether plan and model give the same logits and gradients on one or two of ``images``; compared once.

    Runs the plan in float32 by PyTorch. The tolerance is far wider than roundoff: what this finds is a forward that
    the capture did not see in full.

    Args:
        images: [N, C, H, W] float32.

    Raises:
        NotCaptured: the model itself fails on so few images.
    """
    count = min(len(images), 2)
    if count in program.verified or count == 0:
        return True
    device = program.executor.device
    probe = Program(program.plan, program.nodes, model, program.shape, TorchExecutor(torch.float32, device))
    probe.largest_chunk = 1  # images must not see each other
    x = images[:count].detach().contiguous()
    direction = torch.randn(count, program.classes, generator=torch.Generator().manual_seed(0)).to(device)
    planned_logits: list[Tensor] = []

    def gradient_of(logits: Tensor, rows: slice) -> Tensor:
        planned_logits.append(logits.clone())
        return direction[rows]

    def step(prepare, x, clean, gradient, nan, out):
        x.copy_(prepare.gradient(x, gradient))

    with random_numbers_restored(), torch.autocast(device.type, enabled=False):
        with torch.no_grad():
            probe.fold(model)
            gradient = probe.attack(x, x, 1, gradient_of, step)
        try:
            with torch.enable_grad():
                pixels = x.clone().requires_grad_()
                logits = model(pixels)
                if logits.shape != direction.shape:
                    return False
                (expected,) = torch.autograd.grad((logits * direction).sum(), pixels)
        except Exception as error:  # no fault of the plan
            raise NotCaptured(f"the model fails on {count} of the images: {in_one_line(error)}") from error
    if not (_close(torch.cat(planned_logits), logits.detach()) and _close(gradient, expected)):
        return False
    program.verified.add(count)
    return True


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Whether their L2 distance is small relative to ``expected``; NaN and infinity count as 0."""
    actual, expected = (t.nan_to_num(0, 0, 0).double().flatten() for t in (actual, expected))
    return bool((actual - expected).norm() <= DIFFERENT * expected.norm() + 1e-6)
