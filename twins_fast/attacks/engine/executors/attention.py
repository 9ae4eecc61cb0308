"""Attention in bfloat16 on CPUs as a few products of matrices.

PyTorch's fused one takes 2 to 6 times as long, nearly all of it backward; in float32 it is as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_WEIGHTS = 1 << 20  # of a head, which lie in memory until the backward pass


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` without dropout."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if not _takes(query, key, mask) or is_causal or enable_gqa:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
    return _Attention.apply(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)


def _takes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    added = mask is None or (mask.is_floating_point() and not mask.requires_grad)
    return added and query.dtype == torch.bfloat16 and query.shape[-2] * key.shape[-2] <= MOST_WEIGHTS


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            query = query * scale
            scores = query @ key.mT
            if mask is not None:
                scores += mask
            weights = scores.softmax(-1)
            ctx.save_for_backward(query, key, value, weights)
            ctx.scale = scale
            return weights @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        slope = torch._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype)
        return slope @ key * ctx.scale, slope.mT @ query, weights.mT @ gradient, None, None
