"""Batch statistics over several processes: two small collectives between the phases of a backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from twins_fast.ops import backend, layout, phases
from twins_fast.ops.group import member, together, world_size
from twins_fast.ops.wing import Wing, wings_of


@torch.compiler.disable  # which imports the compiler: this file is imported where it is needed
def twin_batch_norm(x, residual, split, frozen, adaptive, momentum, eps, relu, name, group) -> Tensor:
    """:func:`twins_fast.ops.twin_batch_norm` with the adaptive statistics of all processes of ``group``.

    x and residual are dense and of one layout, vectors float32 (float64 for float64); ``name`` is the
    backend. The running statistics of ``adaptive`` are updated in place.

    Raises:
        ValueError: fewer than two values per channel in all processes together; on each of them, before
            anything is written.
    """
    with torch.no_grad():
        count, stats = _gather_statistics(x, split, adaptive, momentum, eps, name, group)
    adaptive = Wing(weight=adaptive.weight, bias=adaptive.bias)
    return _TwinBatchNorm.apply(x, residual, split, stats, count, eps, relu, name, group, *frozen, *adaptive)


def _gather_statistics(x, split, adaptive, momentum, eps, name, group) -> tuple[Tensor, Tensor]:
    """Count (scalar) and [2, C] mean and 1 / std of the adaptive rows of all processes."""
    moments = backend.implementation(name).moments(x, split)
    count = (x.shape[0] - split) * x.shape[2] * x.shape[3]
    # float64 holds every count; one tensor makes one collective.
    sent = torch.cat([moments.double().flatten(), moments.new_full((1,), count, dtype=torch.float64)])
    received = sent.new_empty(world_size(group), sent.numel())
    with together():
        dist.all_gather(list(received), sent, group=member(group))
    counts = received[:, -1]
    if count < 2:  # else there are two, and the device need not be waited for
        total = int(counts.sum())
        if total == 0:  # nobody has adaptive rows
            return counts.sum() + 1, torch.zeros_like(moments)
        if total < 2:
            raise ValueError(f"batch statistics need at least 2 values per channel in all processes, got {total}")
    total, (mean, deviation) = phases.combine(counts, received[:, :-1].unflatten(1, moments.shape))
    for running, new in zip(adaptive[:2], (mean, deviation / (total - 1)), strict=True):
        if running is not None:
            running.copy_((1.0 - momentum) * running.double() + momentum * new)
    return total, torch.stack([mean, (deviation / total + eps).rsqrt()]).to(moments.dtype)


class _TwinBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, split, stats, count, eps, relu, name, group, *vectors):
        keep_bits = relu and any(ctx.needs_input_grad)
        frozen, adaptive = wings_of(vectors)
        kernel = backend.implementation(name)
        y, bits = kernel.apply(x, residual, split, frozen, adaptive, stats, eps, relu, keep_bits)
        ctx.save_for_backward(x, bits, stats, count, *frozen[:3], adaptive.weight)
        ctx.split, ctx.eps, ctx.relu, ctx.name, ctx.group = split, eps, relu, name, group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, bits, stats, count, *frozen, weight = ctx.saved_tensors
        frozen, adaptive = Wing(*frozen), Wing(weight=weight)
        kernel, split = backend.implementation(ctx.name), ctx.split
        dy = dy.contiguous(memory_format=layout.nearest(x))
        sums = kernel.sums(dy, x, bits, split, frozen, stats)
        shared = sums[2:].clone()
        # On every process, whatever it wants itself: the others wait for its sums.
        with together():
            dist.all_reduce(shared, group=member(ctx.group))
        need_x, need_residual = ctx.needs_input_grad[:2]
        wanted = [need_x, need_residual and ctx.relu]
        dx, dresidual, dfw, dfb = None, dy, None, None
        if any(wanted):
            means = (shared / count).to(shared.dtype)
            dx, masked = kernel.apply_backward(dy, x, bits, split, frozen, adaptive, stats, means, ctx.eps, wanted)
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
