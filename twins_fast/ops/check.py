"""What the arguments of two-wing batch norm must be, told before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twins_fast.ops.wing import Wing

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_arguments(
    x: Any,
    split: Any,
    frozen: Any,
    adaptive: Any,
    momentum: Any,
    eps: Any,
    residual: Any,
    relu: Any,
    both_adaptive: Any,
    shared: bool,
) -> None:
    """Raise what :func:`twins_fast.ops.twin_batch_norm` says of its arguments.

    ``shared``: other processes have adaptive rows, too, so that two values per channel are not needed here.
    """
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
    if not isinstance(both_adaptive, bool):
        raise TypeError(f"both_adaptive must be a bool, got {both_adaptive!r}")
    if eps == 0.0 and (split < rows or both_adaptive):
        raise ValueError("eps must be > 0 for batch statistics, got 0")
    _check_wing("frozen", frozen, x)
    _check_wing("adaptive", adaptive, x)
    if frozen[0] is not None and (frozen[0] is adaptive[0] or frozen[1] is adaptive[1]):
        raise ValueError("frozen and adaptive running statistics must be different tensors")
    if split > 0 and frozen[0] is None and not both_adaptive:
        raise ValueError(f"frozen running_mean and running_var must not be None when split > 0, got split={split}")
    for half in (split, rows - split) if both_adaptive else (rows - split,):
        if not shared and half > 0 and half * height * width < 2:
            raise ValueError(
                f"an adaptive half needs at least 2 values per channel, got {half} row(s) of "
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


def _check_wing(wing: str, vectors: Any, x: Tensor) -> None:
    if not isinstance(vectors, (tuple, list)) or len(vectors) != 4:
        raise TypeError(f"{wing} must be (running_mean, running_var, weight, bias), got {type(vectors).__name__}")
    for name, vector in zip(Wing._fields, vectors, strict=True):
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
    for name, vector in (("running_mean", vectors[0]), ("running_var", vectors[1])):
        if vector is not None and vector.requires_grad:
            raise ValueError(f"{wing} {name} must not require a gradient")
        if vector is not None and vector.shape[0] > 1 and vector.stride(0) == 0:
            raise ValueError(f"{wing} {name} must not be an expanded tensor, whose values share their memory")
    if (vectors[0] is None) != (vectors[1] is None):
        raise ValueError(f"{wing} running_mean and running_var must both be tensors or both be None")
