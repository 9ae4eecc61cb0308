"""Batch statistics over several processes: two small collectives between the phases of a backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from twins_fast.ops import backend, layout, phases
from twins_fast.ops.group import member, together, world_size
from twins_fast.ops.wing import Wing, vectors_of_backward, wings_of


@torch.compiler.disable  # which imports the compiler: this file is imported where it is needed
def twin_batch_norm(x, residual, split, frozen, adaptive, momentum, eps, relu, both_adaptive, name, group) -> Tensor:
    """:func:`twins_fast.ops.twin_batch_norm` with the adaptive statistics of all processes of ``group``.

    x and residual are dense and of one layout, vectors float32 (float64 for float64); ``name`` is the
    backend. The running statistics of adaptive wings are updated in place.

    Raises:
        ValueError: fewer than two values per channel in all processes together; on each of them, before
            anything is written.
    """
    halves = [(x[:split], 0, frozen), (x, split, adaptive)] if both_adaptive else [(x, split, adaptive)]
    with torch.no_grad():
        counts, statistics = _gather_statistics(halves, momentum, name, group)
        mean, variance = statistics[-1]
        stats = torch.stack([mean, (variance + eps).rsqrt()]).to(layout.vector_dtype(x))
        if both_adaptive:  # the forward pass does not tell statistics of all processes from frozen ones
            frozen = Wing(*statistics[0].to(stats.dtype), frozen.weight, frozen.bias)
    adaptive = Wing(weight=adaptive.weight, bias=adaptive.bias)
    return _TwinBatchNorm.apply(x, residual, split, stats, counts, eps, relu, name, group, *frozen, *adaptive)


def _gather_statistics(halves, momentum, name, group) -> tuple[Tensor, list[Tensor]]:
    """Counts [K] and [2, C] mean and variance of the adaptive rows of all processes, in each of K halves.

    A half is (x, the first of its rows in there, wing).
    """
    own, sent = [], []
    for x, first, _ in halves:
        own.append((x.shape[0] - first) * x.shape[2] * x.shape[3])
        moments = (backend.implementation(name) if own[-1] else phases).moments(x, first)
        # float64 holds every count; one tensor makes one collective.
        sent += [moments.double().flatten(), moments.new_full((1,), own[-1], dtype=torch.float64)]
    message = torch.cat(sent)
    received = message.new_empty(world_size(group), message.numel())
    with together():
        dist.all_gather(list(received), message, group=member(group))
    received = received.unflatten(1, (len(halves), -1))
    everywhere = [None if count >= 2 else int(received[:, i, -1].sum()) for i, count in enumerate(own)]
    for total in everywhere:  # None: two or more, and the device need not be waited for
        if total == 1:
            raise ValueError(f"batch statistics need at least 2 values per channel in all processes, got {total}")
    counts, statistics = [], []
    for i, (x, _, wing) in enumerate(halves):
        parts = received[:, i, :-1].unflatten(1, (2, x.shape[1]))
        if everywhere[i] == 0:  # nobody has such rows: 1 / std of 0, whatever eps is
            counts.append(received.new_ones(()))
            statistics.append(torch.stack([torch.zeros_like(parts[0, 0]), torch.full_like(parts[0, 1], torch.inf)]))
            continue
        count, (mean, deviation) = phases.combine(received[:, i, -1], parts)
        for running, new in zip(wing[:2], (mean, deviation / (count - 1)), strict=True):
            if running is not None:
                running.copy_((1.0 - momentum) * running.double() + momentum * new)
        counts.append(count)
        statistics.append(torch.stack([mean, deviation / count]))
    return torch.stack(counts), statistics


class _TwinBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, split, stats, counts, eps, relu, name, group, *vectors):
        keep_bits = relu and any(ctx.needs_input_grad)
        frozen, adaptive = wings_of(vectors)
        kernel = backend.implementation(name)
        y, bits = kernel.apply(x, residual, split, frozen, adaptive, stats, eps, relu, keep_bits)
        ctx.save_for_backward(x, bits, stats, counts, *vectors_of_backward(frozen, adaptive))
        ctx.split, ctx.eps, ctx.relu, ctx.name, ctx.group = split, eps, relu, name, group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, bits, stats, counts, *frozen, weight = ctx.saved_tensors
        frozen, adaptive = Wing(*frozen), Wing(weight=weight)
        kernel, split = backend.implementation(ctx.name), ctx.split
        dy = dy.contiguous(memory_format=layout.nearest(x))
        sums = kernel.sums(dy, x, bits, split, frozen, stats)
        shared = sums.view(2, 2, -1)[2 - len(counts) :].clone()
        # On every process, whatever it wants itself: the others wait for its sums.
        with together():
            dist.all_reduce(shared, group=member(ctx.group))
        need_x, need_residual = ctx.needs_input_grad[:2]
        wanted = [need_x, need_residual and ctx.relu]
        dx, dresidual, dfw, dfb = None, dy, None, None
        if any(wanted):
            means = (shared / counts[:, None, None]).to(shared.dtype)
            if len(counts) == 1 or split == 0:
                dx, masked = kernel.apply_backward(
                    dy, x, bits, split, frozen, adaptive, stats, means[-1], ctx.eps, wanted
                )
            else:
                dx, masked = _apply_backward_to_both(
                    kernel, dy, x, bits, split, frozen, adaptive, stats, means, ctx.eps, wanted
                )
            dresidual = masked if ctx.relu else dy
        if frozen.running_var is not None and split > 0:
            dfb, dfw = sums[0], sums[1] * (frozen.running_var + ctx.eps).rsqrt()
        grads = (
            dx,
            dresidual,
            *[None] * 7,
            *Wing(weight=dfw, bias=dfb),
            *Wing(weight=sums[3] * stats[1], bias=sums[2]),
        )
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


def _apply_backward_to_both(kernel, dy, x, bits, split, first, second, stats, means, eps, wanted) -> list[Tensor]:
    """Gradients of x and residual by a call for each half, all of whose rows are adaptive."""
    stats = torch.stack([first.running_mean, (first.running_var + eps).rsqrt()]), stats
    rows = len(bits) // len(x) * split
    results = []
    for i, (wing, images, of_bits) in enumerate(
        [(first, slice(split), slice(rows)), (second, slice(split, None), slice(rows, None))]
    ):
        if len(x[images]) == 0:
            continue
        arguments = dy[images], x[images], bits[of_bits], 0, Wing(), Wing(weight=wing.weight)
        results.append(kernel.apply_backward(*arguments, stats[i], means[i], eps, wanted))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]
