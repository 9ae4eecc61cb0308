"""The one place where ops are validated, registered with PyTorch and handed to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from twins_fast.ops import backend, layout, reference, sync
from twins_fast.ops.reference import Wing

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_VECTORS = ("running_mean", "running_var", "weight", "bias")


def twin_batch_norm(
    x: Tensor,
    split: int,
    frozen: Wing,
    adaptive: Wing,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    process_group: sync.Group = None,
) -> Tensor:
    """Two-wing batch norm (TWINS, arXiv 2303.11135, section 4) with an optional residual and ReLU.

    Rows ``[0, split)`` are normalised with the frozen running statistics, rows ``[split, N)`` with
    their own batch statistics, each followed by its wing's weight and bias; then
    ``y = relu(normalised + residual)``.

    Args:
        x: [N, C, H, W], not empty; float32, bfloat16, float16 or float64; any strides.
        split: rows of the frozen wing, in [0, N]. The other rows need two values per channel.
        frozen: (running_mean, running_var, weight, bias), each [C]. The statistics are required when
            ``split > 0`` and never change; weight and bias may be ``None``.
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
    shared = process_group is not None and sync.world_size(process_group) > 1
    _check(x, split, frozen, adaptive, momentum, eps, residual, relu, shared)
    name = backend.choose("twin_batch_norm", x)
    if name == "torch" and not shared:
        return reference.twin_batch_norm(x, split, frozen, adaptive, momentum, eps, residual, relu)
    memory_format = layout.nearest(x)
    x = _dense(x, memory_format)
    if residual is not None:
        residual = _dense(residual, memory_format)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = [_as_vector(v, dtype) for v in (*frozen, *adaptive)]
    leaves = (x, residual, *vectors[2:4], *vectors[6:8])
    if shared:
        y = sync.twin_batch_norm(x, residual, split, *vectors, momentum, eps, relu, name, process_group)
    elif _is_differentiated(leaves):
        y = _TwinBatchNorm.apply(x, residual, split, *vectors, momentum, eps, relu, name)
    else:
        y, _, _ = _forward(x, residual, split, *vectors, momentum, eps, relu, False, name)
    for given, used in zip(adaptive[:2], vectors[4:6], strict=True):
        if given is not used:  # half precision or strided
            given.copy_(used)
    return y


class _TwinBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, split, fm, fv, fw, fb, rm, rv, w, b, momentum, eps, relu, name):
        vectors = (fm, fv, fw, fb, rm, rv, w, b)
        y, bits, stats = _forward(x, residual, split, *vectors, momentum, eps, relu, relu, name)
        ctx.save_for_backward(x, bits, stats, fm, fv, fw, w)
        ctx.split, ctx.eps, ctx.relu, ctx.name = split, eps, relu, name
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, bits, stats, fm, fv, fw, w = ctx.saved_tensors
        need_x, need_residual, *need = ctx.needs_input_grad
        frozen, adaptive = ctx.split > 0, ctx.split < x.shape[0]  # a wing without rows has no gradient
        wanted = [need_x, need_residual and ctx.relu, need[3] and frozen, need[4] and frozen]
        wanted += [need[7] and adaptive, need[8] and adaptive]
        dy = _dense(dy, layout.nearest(x))
        grads = [None] * 6
        if any(wanted):
            results = _backward(dy, x, bits, ctx.split, fm, fv, fw, w, stats, ctx.eps, wanted, ctx.name)
            grads = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
        dx, dresidual, dfw, dfb, dw, db = grads
        if need_residual and not ctx.relu:
            dresidual = dy
        return dx, dresidual, None, None, None, dfw, dfb, None, None, dw, db, None, None, None, None


def _is_differentiated(leaves) -> bool:
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


def _check(x, split, frozen, adaptive, momentum, eps, residual, relu, shared) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    rows, channels, height, width = x.shape
    if isinstance(split, bool) or not isinstance(split, (int, torch.SymInt)):
        raise TypeError(f"split must be an int, got {split!r}")
    if not 0 <= split <= rows:
        raise ValueError(f"split must be in [0, {rows}], got {split}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (float, int)):
            raise TypeError(f"{name} must be a float, got {value!r}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if eps == 0.0 and split < rows:
        raise ValueError("eps must be > 0 for batch statistics, got 0")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool, got {relu!r}")
    _check_wing("frozen", frozen, x)
    _check_wing("adaptive", adaptive, x)
    if frozen[0] is not None and (frozen[0] is adaptive[0] or frozen[1] is adaptive[1]):
        raise ValueError("frozen and adaptive running statistics must be different tensors")
    if split > 0 and frozen[0] is None:
        raise ValueError(f"frozen running_mean and running_var must not be None when split > 0, got split={split}")
    if not shared and split < rows and (rows - split) * height * width < 2:
        raise ValueError(
            f"the adaptive half needs at least 2 values per channel, got {rows - split} row(s) of "
            f"{height} x {width} pixels (N={rows}, split={split})"
        )
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None, got {type(residual).__name__}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
        if residual.shape != x.shape:
            raise ValueError(f"residual must have shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")


def _check_wing(wing: str, vectors: Wing, x: Tensor) -> None:
    if not isinstance(vectors, (tuple, list)) or len(vectors) != 4:
        raise TypeError(f"{wing} must be (running_mean, running_var, weight, bias), got {type(vectors).__name__}")
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{wing} {name} must be a tensor or None, got {type(vector).__name__}")
        if vector.dim() != 1 or vector.shape[0] != x.shape[1]:
            raise ValueError(f"{wing} {name} must have shape ({x.shape[1]},), got {tuple(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{wing} {name} must be on {x.device} like x, got {vector.device}")
        if vector.dtype != x.dtype and (vector.dtype != torch.float32 or x.dtype == torch.float64):
            raise TypeError(f"{wing} {name} must be {x.dtype} like x (or float32 beside half), got {vector.dtype}")
    for name, vector in zip(_VECTORS[:2], vectors[:2], strict=True):
        if vector is not None and vector.requires_grad:
            raise ValueError(f"{wing} {name} must not require a gradient")
        if vector is not None and vector.shape[0] > 1 and vector.stride(0) == 0:
            raise ValueError(f"{wing} {name} must not be an expanded tensor, whose values share their memory")
    if (vectors[0] is None) != (vectors[1] is None):
        raise ValueError(f"{wing} running_mean and running_var must both be tensors or both be None")


# fm, fv, fw, fb: the frozen wing; rm, rv, w, b: the adaptive one. x, residual and dy are dense and of one layout.
# bits: the signs of y when keep_bits, else empty (see layout.empty_bits).
# stats: [2, C] float32, mean and 1 / std of the adaptive half.
# wanted: which of the six results are computed; the others come back empty.
# backend: one of backend.BACKENDS but torch, chosen before.
_library = torch.library.Library("twins_fast", "DEF")
_library.define(
    "twin_bn_forward(Tensor x, Tensor? residual, SymInt split, Tensor? fm, Tensor? fv, Tensor? fw, Tensor? fb, "
    "Tensor(a!)? rm, Tensor(b!)? rv, Tensor? w, Tensor? b, float momentum, float eps, bool relu, bool keep_bits, "
    "str backend) -> (Tensor y, Tensor bits, Tensor stats)"
)
_library.define(
    "twin_bn_backward(Tensor dy, Tensor x, Tensor bits, SymInt split, Tensor? fm, Tensor? fv, Tensor? fw, "
    "Tensor? w, Tensor stats, float eps, bool[] wanted, str backend) -> "
    "(Tensor dx, Tensor dresidual, Tensor dfw, Tensor dfb, Tensor dw, Tensor db)"
)


def _run_forward(x, residual, split, fm, fv, fw, fb, rm, rv, w, b, momentum, eps, relu, keep_bits, name):
    wings = (fm, fv, fw, fb), (rm, rv, w, b)
    results = backend.implementation(name).forward(x, residual, split, *wings, momentum, eps, relu, keep_bits)
    for buffer in (rm, rv):
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)  # autograd does not see writes by kernels
    return results


def _run_backward(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted, name):
    return backend.implementation(name).backward(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted)


for _device in ("CPU", "CUDA"):
    _library.impl("twin_bn_forward", _run_forward, _device)
    _library.impl("twin_bn_backward", _run_backward, _device)


def _are_plain(tensors) -> bool:
    """Whether nobody watches: a call on such tensors need not go through PyTorch's dispatcher, which takes longer."""
    if torch.compiler.is_compiling():
        return False
    return (
        all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.maybe_current_level()
        and not torch.jit.is_tracing()
        and not torch._ops._len_torch_dispatch_stack_pre_dispatch()
    )


def _forward(x, residual, split, fm, fv, fw, fb, rm, rv, w, b, *rest):
    plain = _are_plain((x, residual, fm, fv, fw, fb, rm, rv, w, b))
    run = _run_forward if plain else torch.ops.twins_fast.twin_bn_forward.default
    return run(x, residual, split, fm, fv, fw, fb, rm, rv, w, b, *rest)


def _backward(dy, x, bits, split, fm, fv, fw, w, stats, *rest):
    run = _run_backward if _are_plain((dy, x, fw, w)) else torch.ops.twins_fast.twin_bn_backward.default
    return run(dy, x, bits, split, fm, fv, fw, w, stats, *rest)


@torch.library.register_fake("twins_fast::twin_bn_forward", lib=_library)
def _fake_forward(x, residual, split, fm, fv, fw, fb, rm, rv, w, b, momentum, eps, relu, keep_bits, name):
    return layout.forward_results(x, keep_bits)


@torch.library.register_fake("twins_fast::twin_bn_backward", lib=_library)
def _fake_backward(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted, name):
    return tuple(layout.backward_results(x, wanted))
