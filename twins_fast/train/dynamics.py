"""What training does to weights, gradients and wings, measured at a chosen interval."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.checkpoints import load_checkpoint, save_checkpoint
from twins_fast.nn import TwinBatchNorm2d


class Dynamics:
    """Measures a network every so many steps, and looks at the gradients of all of them.

    Norms are L2, over all trained parameters (``weight_norm``) and for each *layer* (``weight_norms``), which is a
    trained weight of two dimensions or more: a kernel or a matrix.

    ==========================  ======================================================================================
    ``weight_norm(s)``          |w| after the step
    ``distance(s)``             |w - w0|, w0 being the weights before the first step of the run
    ``effective_lr(s)``         lr / |w|^2. Before a batch norm the length of w changes nothing but how fast its
                                direction turns, which this is the rate of (van Laarhoven, arXiv 1706.05350; Hoffer et
                                al., arXiv 1803.01814). A frozen wing breaks that (TWINS, arXiv 2303.11135).
    ``gradient_norm(s)``        |g|, g being the gradient of the loss of a batch without weight decay: the mean over
                                the ``batches`` since the measurement before, each at the weights that it met
    ``gradient_variance(s)``    the unbiased variance of |g| over the same batches, if there are two
    ``mean_shift(s)``           of the wings: (mean of the adaptive wing - mean of the frozen one) / standard deviation
                                of the frozen one, root mean square over the channels
    ``variance_shift(s)``       ln(variance of the adaptive wing / variance of the frozen one), likewise
    ==========================  ======================================================================================

    The statistics are the running ones, with the batch norm's eps added to the variances; ``mean_shifts`` and
    ``variance_shifts`` are those of each two-wing batch norm. Batches whose gradient is not finite do not count: their
    step is skipped.

    Args:
        model: the network.
        optimizer: of its parameters.
        every: steps from one measurement to the next.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int):
        self.every = every
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._weights = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        self._layers = [place for place, weight in enumerate(self._weights.values()) if weight.dim() > 1]
        self._wings = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, TwinBatchNorm2d) and module.running_mean is not None
        }
        self._start: dict[str, Tensor] = {}
        self._forget_gradients()

    def keep_start(self, path: Path) -> None:
        """Measure distances from the weights as they are, and write them into a file."""
        save_checkpoint(path, self._weights, {})
        self.load_start(path)

    def load_start(self, path: Path) -> None:
        """Measure distances from the weights in a file of :meth:`keep_start`."""
        start, _ = load_checkpoint(path)
        self._start = {name: torch.empty_like(w).copy_(start[name]).detach() for name, w in self._weights.items()}

    def look(self, gradient_norms: Tensor) -> None:
        """Take in the norms of a batch's gradients, one for each parameter of the optimiser."""
        norms = _with_total(gradient_norms)
        if not norms.isfinite().all():
            return
        self._batches += 1
        off = norms - self._means  # Welford's way
        self._means = self._means + off / self._batches
        self._squares = self._squares + off * (norms - self._means)

    @torch.no_grad()
    def measure(self, lr: float) -> dict[str, Any]:
        """The figures after a step with this learning rate; begins anew with the gradients."""
        weights = list(self._weights.values())
        norms = _with_total(torch.stack(torch._foreach_norm(weights)))
        figures = {"batches": self._batches, "layers": [self._names[place] for place in self._layers]}
        figures |= self._of_layers("weight_norm", norms) | self._of_layers("effective_lr", lr / norms**2)
        if self._start:
            moved = [torch.dist(weight, start) for weight, start in zip(weights, self._start.values(), strict=True)]
            figures |= self._of_layers("distance", _with_total(torch.stack(moved)))
        if self._batches:
            figures |= self._of_layers("gradient_norm", self._means)
        if self._batches > 1:
            figures |= self._of_layers("gradient_variance", self._squares / (self._batches - 1))
        self._forget_gradients()
        return figures | self._shifts()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to know of the gradients so far."""
        return {"batches": torch.tensor(self._batches), "means": self._means, "squares": self._squares}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self._batches, self._means, self._squares = int(state["batches"]), state["means"], state["squares"]

    def _forget_gradients(self) -> None:
        self._batches = 0
        self._means = self._squares = torch.zeros(len(self._weights) + 1, dtype=torch.float64)

    @property
    def _names(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self._weights]

    def _of_layers(self, name: str, values: Tensor) -> dict[str, Any]:
        """The total, which is the last value, and those of the layers."""
        return {name: _short(values[-1]), f"{name}s": [_short(values[place]) for place in self._layers]}

    def _shifts(self) -> dict[str, Any]:
        if not self._wings:
            return {}
        adaptive = list(self._wings.values())
        frozen = [layer.main_bn for layer in adaptive]
        means = torch._foreach_sub([w.running_mean for w in adaptive], [w.running_mean for w in frozen])
        # The adaptive wing's variances, then the frozen one's.
        variances = torch._foreach_add([w.running_var for w in adaptive + frozen], 2 * [w.eps for w in adaptive])
        torch._foreach_div_(means, torch._foreach_sqrt(variances[len(adaptive) :]))
        logarithms = torch._foreach_log(variances)
        changes = torch._foreach_sub(logarithms[: len(adaptive)], logarithms[len(adaptive) :])
        channels = torch.tensor([layer.num_features for layer in adaptive], dtype=torch.float64)
        channels = torch.cat([channels, channels.sum()[None]]).sqrt()
        figures: dict[str, Any] = {"wings": list(self._wings)}
        for name, parts in (("mean_shift", means), ("variance_shift", changes)):
            *each, whole = (_with_total(torch.stack(torch._foreach_norm(parts))) / channels).tolist()
            figures |= {name: _short(whole), f"{name}s": [_short(value) for value in each]}
        return figures


def robust_gap(lines: Iterable[dict[str, Any]], after: int, robust: float) -> float | None:
    """Accuracy on training batches under the training attack minus ``robust``, what an evaluation under attack found.

    Args:
        lines: of ``metrics.jsonl``; the batches after step ``after`` count, of two wings the adaptive one's halves.
        after: a step.
        robust: accuracy, in [0, 1].

    Returns:
        None without a batch.
    """
    training = [line for line in lines if line["kind"] == "train" and line["step"] > after]
    found = [line.get("adaptive_accuracy", line["accuracy"]) for line in training]
    return sum(found) / len(found) - robust if found else None


def _with_total(norms: Tensor) -> Tensor:
    """Norms of parts and, as the last one, of all of them; float64 on the CPU."""
    norms = norms.detach().to("cpu", torch.float64)
    return torch.cat([norms, norms.norm()[None]])


def _short(value: Tensor | float) -> float | None:
    """Six digits; None for what JSON lacks, such as the rate of a weight that is zero."""
    return float(f"{float(value):.6g}") if isfinite(value) else None
