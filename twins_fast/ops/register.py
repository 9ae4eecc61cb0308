"""The op as PyTorch knows it: schemas, kernels and fakes, so that compilers and tracers see a call as one node."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from twins_fast.ops import backend, layout
from twins_fast.ops.wing import Wing, vectors_of_backward, written_by

# fm, fv, fw, fb: the frozen wing; rm, rv, w, b: the adaptive one, one by one since two of them are written to. The
# overload both_adaptive takes batch statistics for both, and writes to four.
# x, residual and dy are dense and of one layout.
# bits: the signs of y when keep_bits, else empty (see layout.empty_bits).
# stats: [2, C] float32, mean and 1 / std of the adaptive half; [4, C] where both are, those of the first half last.
# wanted: which of the six results are computed; the others come back empty.
# backend: one of backend.BACKENDS but torch, chosen before.
_library = torch.library.Library("twins_fast", "DEF")
for _overload, _fm, _fv in (("", "Tensor?", "Tensor?"), (".both_adaptive", "Tensor(c!)?", "Tensor(d!)?")):
    _library.define(
        f"twin_bn_forward{_overload}(Tensor x, Tensor? residual, SymInt split, {_fm} fm, {_fv} fv, Tensor? fw, "
        "Tensor? fb, Tensor(a!)? rm, Tensor(b!)? rv, Tensor? w, Tensor? b, float momentum, float eps, bool relu, "
        "bool keep_bits, str backend) -> (Tensor y, Tensor bits, Tensor stats)"
    )
_library.define(
    "twin_bn_backward(Tensor dy, Tensor x, Tensor bits, SymInt split, Tensor? fm, Tensor? fv, Tensor? fw, "
    "Tensor? w, Tensor stats, float eps, bool[] wanted, str backend) -> "
    "(Tensor dx, Tensor dresidual, Tensor dfw, Tensor dfb, Tensor dw, Tensor db)"
)


def forward(both_adaptive, x, residual, split, frozen, adaptive, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """``twin_bn_forward`` of two :class:`Wing`; the rest as in its schema."""
    if _are_plain((x, residual, *frozen, *adaptive)):
        return _run_forward(both_adaptive, x, residual, split, frozen, adaptive, *rest)
    overloads = torch.ops.twins_fast.twin_bn_forward
    overload = overloads.both_adaptive if both_adaptive else overloads.default
    return overload(x, residual, split, *frozen, *adaptive, *rest)


def backward(dy, x, bits, split, frozen, adaptive, *rest) -> tuple[Tensor, ...]:
    """``twin_bn_backward`` of two :class:`Wing`; the rest as in its schema."""
    if _are_plain((dy, x, frozen.weight, adaptive.weight)):
        return _run_backward(dy, x, bits, split, frozen, adaptive, *rest)
    vectors = vectors_of_backward(frozen, adaptive)
    return torch.ops.twins_fast.twin_bn_backward.default(dy, x, bits, split, *vectors, *rest)


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


def _run_forward(both_adaptive, x, residual, split, frozen, adaptive, momentum, eps, relu, keep_bits, name):
    kernel = backend.implementation(name)
    results = kernel.forward(x, residual, split, frozen, adaptive, momentum, eps, relu, keep_bits, both_adaptive)
    for buffer in written_by(frozen, adaptive, both_adaptive):
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)  # autograd does not see writes by kernels
    return results


def _run_backward(dy, x, bits, split, frozen, adaptive, stats, eps, wanted, name):
    return backend.implementation(name).backward(dy, x, bits, split, frozen, adaptive, stats, eps, wanted)


def _forward_of_schema(both_adaptive, x, residual, split, fm, fv, fw, fb, rm, rv, w, b, *rest):
    return _run_forward(both_adaptive, x, residual, split, Wing(fm, fv, fw, fb), Wing(rm, rv, w, b), *rest)


def _backward_of_schema(dy, x, bits, split, fm, fv, fw, w, *rest):
    return _run_backward(dy, x, bits, split, Wing(fm, fv, fw), Wing(weight=w), *rest)


def _fake_forward(
    both_adaptive, x, residual, split, fm, fv, fw, fb, rm, rv, w, b, momentum, eps, relu, keep_bits, name
):
    return layout.forward_results(x, keep_bits, both_adaptive)


for _device in ("CPU", "CUDA"):
    _library.impl("twin_bn_backward", _backward_of_schema, _device)
for _overload, _both in (("", False), (".both_adaptive", True)):
    for _device in ("CPU", "CUDA"):
        _library.impl(f"twin_bn_forward{_overload}", partial(_forward_of_schema, _both), _device)
    torch.library.register_fake(f"twins_fast::twin_bn_forward{_overload}", partial(_fake_forward, _both), lib=_library)


@torch.library.register_fake("twins_fast::twin_bn_backward", lib=_library)
def _fake_backward(dy, x, bits, split, fm, fv, fw, w, stats, eps, wanted, name):
    return tuple(layout.backward_results(x, wanted))
