"""Two-wing batch norm as a function, and its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twins_fast.ops import backend, layout, reference, register
from twins_fast.ops.check import check_arguments
from twins_fast.ops.group import Group, world_size
from twins_fast.ops.wing import Wing, vectors_of_backward, wings_of, written_by


def twin_batch_norm(
    x: Tensor,
    split: int,
    frozen: Wing | Sequence[Tensor | None],
    adaptive: Wing | Sequence[Tensor | None],
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    process_group: Group = None,
    both_adaptive: bool = False,
) -> Tensor:
    """Two-wing batch norm (TWINS, arXiv 2303.11135, section 4) with an optional residual and ReLU.

    Rows ``[0, split)`` are normalised with the frozen running statistics, rows ``[split, N)`` with
    their own batch statistics, each followed by its wing's weight and bias; then
    ``y = relu(normalised + residual)``.

    Args:
        x: [N, C, H, W], not empty; float32, bfloat16, float16 or float64; any strides.
        split: rows of the frozen wing, in [0, N]. The other rows need two values per channel.
        frozen: (running_mean, running_var, weight, bias), each [C], as a ``Wing`` or any tuple or list. The
            statistics are required when ``split > 0`` and never change; weight and bias may be ``None``.
        adaptive: the same; running statistics (both or neither may be ``None``) are updated in place
            with the batch mean and the unbiased batch variance when ``split < N``.
        momentum: weight of the new value in the running statistics, in [0, 1].
        eps: added to the variance, >= 0, and > 0 when ``split < N``.
        residual: added before the ReLU; shape, dtype and device of ``x``.
        relu: whether negative results become zero.
        process_group: processes whose adaptive rows are normalised as one batch, in forward and backward:
            a ``torch.distributed`` group, ``"world"`` for the default one, or ``None`` for this process
            alone. All of them must make the call; x may differ in N, and a process may have split = N.
            Gradients of weight and bias are sums over this process's rows.
        both_adaptive: whether rows ``[0, split)`` are normalised with their own batch statistics, too, with all
            that is said of ``adaptive`` for the wing ``frozen``, which is frozen no more: two batches side by side.

    The vectors have the dtype of ``x``, or float32 when ``x`` is half precision; autocast changes
    nothing, as in any batch norm. Kernels compute in float32: values above 1e18 overflow their variance.

    Returns:
        [N, C, H, W], dtype and memory format of ``x``. First derivatives reach ``x``, ``residual`` and
        both wings' weight and bias; only the torch backend differentiates twice.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been written.
        RuntimeError: a backend was forced that cannot run this call; ``process_group`` was given, but
            ``torch.distributed`` is not initialised.
    """
    shared = process_group is not None and world_size(process_group) > 1
    check_arguments(x, split, frozen, adaptive, momentum, eps, residual, relu, both_adaptive, shared)
    name = backend.choose("twin_batch_norm", x)
    if name == "torch" and not shared:
        wings = Wing(*frozen), Wing(*adaptive)
        return reference.twin_batch_norm(x, split, *wings, momentum, eps, residual, relu, both_adaptive)
    memory_format = layout.nearest(x)
    x = _dense(x, memory_format)
    if residual is not None:
        residual = _dense(residual, memory_format)
    dtype = layout.vector_dtype(x)
    statistics = written_by(frozen, adaptive, both_adaptive)
    frozen, adaptive = (Wing(*[_as_vector(v, dtype) for v in wing]) for wing in (frozen, adaptive))
    if shared:
        from twins_fast.ops import sync  # imports the compiler, to keep it out

        how = both_adaptive, name, process_group
        y = sync.twin_batch_norm(x, residual, split, frozen, adaptive, momentum, eps, relu, *how)
    elif _is_differentiated((x, residual, frozen.weight, frozen.bias, adaptive.weight, adaptive.bias)):
        y = _TwinBatchNorm.apply(x, residual, split, momentum, eps, relu, both_adaptive, name, *frozen, *adaptive)
    else:
        rest = momentum, eps, relu, False, name
        y, _, _ = register.forward(both_adaptive, x, residual, split, frozen, adaptive, *rest)
    for buffer, updated in zip(statistics, written_by(frozen, adaptive, both_adaptive), strict=True):
        if buffer is not None and updated is not None and buffer is not updated:  # half precision or strided
            buffer.copy_(updated)
    return y


class _TwinBatchNorm(torch.autograd.Function):
    # Autograd sees tensors among the arguments, not inside of them: hence a wing's vectors one by one.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        split: int,
        momentum: float,
        eps: float,
        relu: bool,
        both_adaptive: bool,
        name: str,
        *vectors: Tensor | None,
    ) -> Tensor:
        frozen, adaptive = wings_of(vectors)
        rest = momentum, eps, relu, relu, name
        y, bits, stats = register.forward(both_adaptive, x, residual, split, frozen, adaptive, *rest)
        if both_adaptive:  # its statistics may change before the backward pass, which does not need them
            frozen = Wing(weight=frozen.weight)
        ctx.save_for_backward(x, bits, stats, *vectors_of_backward(frozen, adaptive))
        ctx.split, ctx.eps, ctx.relu, ctx.name = split, eps, relu, name
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, stats, *frozen, weight = ctx.saved_tensors
        need_x, need_residual, *_ = ctx.needs_input_grad
        need_frozen, need_adaptive = wings_of(ctx.needs_input_grad[-8:])
        has_frozen, has_adaptive = ctx.split > 0, ctx.split < x.shape[0]  # a wing without rows has no gradient
        wanted = [need_x, need_residual and ctx.relu]
        wanted += [need and has_frozen for need in (need_frozen.weight, need_frozen.bias)]
        wanted += [need and has_adaptive for need in (need_adaptive.weight, need_adaptive.bias)]
        dy = _dense(dy, layout.nearest(x))
        grads: list[Tensor | None] = [None] * 6
        if any(wanted):
            wings = Wing(*frozen), Wing(weight=weight)
            results = register.backward(dy, x, bits, ctx.split, *wings, stats, ctx.eps, wanted, ctx.name)
            grads = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
        dx, dresidual, dfw, dfb, dw, db = grads
        if need_residual and not ctx.relu:
            dresidual = dy
        return dx, dresidual, *[None] * 6, *Wing(weight=dfw, bias=dfb), *Wing(weight=dw, bias=db)


def _is_differentiated(leaves: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return True
    # Forward derivatives have no kernel, which autograd then says.
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def _dense(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=memory_format).resolve_neg()


def _as_vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if v is None:
        return None
    return (v if v.dtype == dtype and v.is_contiguous() else v.to(dtype).contiguous()).resolve_neg()
