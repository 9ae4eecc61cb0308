"""The one place where ops are validated, registered with PyTorch and handed to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from twins_fast import backend, reference
from twins_fast.reference import Wing

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
        eps: added to the variance, >= 0.
        residual: added before the ReLU; shape, dtype and device of ``x``.
        relu: whether negative results become zero.

    The vectors have the dtype of ``x``, or float32 when ``x`` is half precision; autocast changes
    nothing, as in any batch norm.

    Returns:
        [N, C, H, W], dtype and memory format of ``x``. First derivatives reach ``x``, ``residual`` and
        both wings' weight and bias; only the torch backend differentiates twice.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been written.
        RuntimeError: a backend was forced that cannot run this call.
    """
    _check(x, split, frozen, adaptive, momentum, eps, residual, relu)
    vectors = (*frozen, *adaptive)
    if backend.choose("twin_batch_norm", x, vectors) == "torch":
        return reference.twin_batch_norm(x, split, frozen, adaptive, momentum, eps, residual, relu)
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    inputs = (x, frozen[2], frozen[3], adaptive[2], adaptive[3])
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, residual)):
        return _TwinBatchNorm.apply(x, residual, split, *vectors, momentum, eps, relu)
    return torch.ops.twins_fast.twin_bn_forward(x, residual, split, *vectors, momentum, eps, relu, False)[0]


class _TwinBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        split: int,
        frozen_mean: Tensor | None,
        frozen_var: Tensor | None,
        frozen_weight: Tensor | None,
        frozen_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y, bits, stats = torch.ops.twins_fast.twin_bn_forward(
            x,
            residual,
            split,
            frozen_mean,
            frozen_var,
            frozen_weight,
            frozen_bias,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            relu,
            relu,
        )
        ctx.save_for_backward(x, bits, stats, frozen_mean, frozen_var, frozen_weight, weight)
        ctx.split, ctx.eps, ctx.relu = split, eps, relu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, bits, stats, frozen_mean, frozen_var, frozen_weight, weight = ctx.saved_tensors
        need_x, need_residual, *need = ctx.needs_input_grad
        wanted = [need_x, need_residual and ctx.relu, need[3], need[4], need[7], need[8]]
        dy = dy.contiguous(memory_format=_layout(x))
        grads = [None] * 6
        if any(wanted):
            outputs = torch.ops.twins_fast.twin_bn_backward(
                dy, x, bits, ctx.split, frozen_mean, frozen_var, frozen_weight, weight, stats, ctx.eps, wanted
            )
            grads = [grad if want else None for grad, want in zip(outputs, wanted, strict=True)]
        dx, dresidual, dfrozen_weight, dfrozen_bias, dweight, dbias = grads
        if need_residual and not ctx.relu:
            dresidual = dy
        none = (None, None)
        return dx, dresidual, None, *none, dfrozen_weight, dfrozen_bias, *none, dweight, dbias, *none, None


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format that the kernels give ``x``: its own if dense, else the nearer one."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def _check(x, split, frozen, adaptive, momentum, eps, residual, relu) -> None:
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
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool, got {relu!r}")
    _check_wing("frozen", frozen, x)
    _check_wing("adaptive", adaptive, x)
    if split > 0 and frozen[0] is None:
        raise ValueError(f"frozen running_mean and running_var must not be None when split > 0, got split={split}")
    if split < rows and (rows - split) * height * width < 2:
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
    if (vectors[0] is None) != (vectors[1] is None):
        raise ValueError(f"{wing} running_mean and running_var must both be tensors or both be None")


_library = torch.library.Library("twins_fast", "DEF")
# frozen_*: the frozen wing; running_*, weight, bias: the adaptive one. x and residual are dense.
# bits: [rows, ceil(run / 8)] uint8, the signs of y when keep_bits (else empty), over y in memory order as
# rows of contiguous runs (W * H pixels of a channel, or C channels of a pixel).
# stats: [2, C] float32, mean and 1 / std of the adaptive half.
_library.define(
    "twin_bn_forward(Tensor x, Tensor? residual, SymInt split, "
    "Tensor? frozen_mean, Tensor? frozen_var, Tensor? frozen_weight, Tensor? frozen_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "float momentum, float eps, bool relu, bool keep_bits) -> (Tensor y, Tensor bits, Tensor stats)"
)
# wanted: which of the six results are computed; the others come back empty. dy has the layout of x.
_library.define(
    "twin_bn_backward(Tensor dy, Tensor x, Tensor bits, SymInt split, "
    "Tensor? frozen_mean, Tensor? frozen_var, Tensor? frozen_weight, Tensor? weight, Tensor stats, "
    "float eps, bool[] wanted) -> (Tensor dx, Tensor dresidual, "
    "Tensor dfrozen_weight, Tensor dfrozen_bias, Tensor dweight, Tensor dbias)"
)


def _is_channels_last(x: Tensor) -> bool:
    """How the kernels walk a dense ``x``; one pixel per image is one run of channels either way."""
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def _forward_outputs(x: Tensor, keep_bits: bool) -> tuple[Tensor, Tensor, Tensor]:
    run = x.shape[1] if _is_channels_last(x) else x.shape[2] * x.shape[3]
    bits_shape = (x.numel() // run, (run + 7) // 8) if keep_bits else (0, 0)
    bits = x.new_empty(bits_shape, dtype=torch.uint8)
    return torch.empty_like(x), bits, x.new_zeros((2, x.shape[1]), dtype=torch.float32)


def _backward_outputs(x: Tensor, wanted: list[bool]) -> list[Tensor]:
    images = [torch.empty_like(x) if want else x.new_empty(0) for want in wanted[:2]]
    lengths = [x.shape[1] if want else 0 for want in wanted[2:]]
    return images + [x.new_zeros(length, dtype=torch.float32) for length in lengths]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _shape(x: Tensor, split: int) -> tuple[int, int, int, int, bool, str]:
    rows, channels, height, width = x.shape
    return rows, channels, height * width, split, _is_channels_last(x), str(x.dtype).removeprefix("torch.")


def _raise_on(status: str) -> None:
    if status:
        raise RuntimeError(f"twin_batch_norm: {status}")


def _forward_cpu(x, residual, split, fm, fv, fw, fb, running_mean, running_var, w, b, momentum, eps, relu, keep_bits):
    y, bits, stats = _forward_outputs(x, keep_bits)
    tensors = (x, residual, fm, fv, fw, fb, running_mean, running_var, w, b, y, bits, stats)
    where = (torch.get_num_threads(), backend.cpu_isa)
    _raise_on(backend._C.twin_bn_forward_cpu(*_shape(x, split), *map(_pointer, tensors), momentum, eps, relu, *where))
    _mark_written(running_mean, running_var)
    return y, bits, stats


def _backward_cpu(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted):
    outputs = _backward_outputs(x, wanted)
    tensors = (dy, x, bits, fm, fv, fw, w, stats, *outputs)
    where = (torch.get_num_threads(), backend.cpu_isa)
    _raise_on(backend._C.twin_bn_backward_cpu(*_shape(x, split), *map(_pointer, tensors), eps, *where))
    return tuple(outputs)


def _forward_cuda(x, residual, split, fm, fv, fw, fb, running_mean, running_var, w, b, momentum, eps, relu, keep_bits):
    y, bits, stats = _forward_outputs(x, keep_bits)
    tensors = (x, residual, fm, fv, fw, fb, running_mean, running_var, w, b, y, bits, stats)
    with torch.cuda.device(x.device):
        where = _workspace_and_stream(x)
        _raise_on(
            backend._C.twin_bn_forward_cuda(*_shape(x, split), *map(_pointer, tensors), momentum, eps, relu, *where)
        )
    _mark_written(running_mean, running_var)
    return y, bits, stats


def _backward_cuda(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted):
    outputs = _backward_outputs(x, wanted)
    tensors = (dy, x, bits, fm, fv, fw, w, stats, *outputs)
    with torch.cuda.device(x.device):
        where = _workspace_and_stream(x)
        _raise_on(backend._C.twin_bn_backward_cuda(*_shape(x, split), *map(_pointer, tensors), eps, *where))
    return tuple(outputs)


def _workspace_and_stream(x: Tensor) -> tuple[int, int]:
    """The workspace may be reused as soon as this returns: by its owner's stream, after the kernels."""
    size = backend._C.twin_bn_workspace_cuda(x.shape[1])
    return x.new_empty(size, dtype=torch.float32).data_ptr(), torch.cuda.current_stream(x.device).cuda_stream


def _mark_written(*buffers: Tensor | None) -> None:
    """Tell autograd about writes through raw pointers."""
    for buffer in buffers:
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


_library.impl("twin_bn_forward", _forward_cpu, "CPU")
_library.impl("twin_bn_backward", _backward_cpu, "CPU")
_library.impl("twin_bn_forward", _forward_cuda, "CUDA")
_library.impl("twin_bn_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("twins_fast::twin_bn_forward", lib=_library)
def _forward_fake(x, residual, split, fm, fv, fw, fb, rm, rv, w, b, momentum, eps, relu, keep_bits):
    return _forward_outputs(x, keep_bits)


@torch.library.register_fake("twins_fast::twin_bn_backward", lib=_library)
def _backward_fake(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted):
    return tuple(_backward_outputs(x, wanted))
