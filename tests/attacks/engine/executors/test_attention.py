"""Attention as products of matrices, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from twins_fast.attacks.engine.executors import attention as module
from twins_fast.attacks.engine.executors.attention import attention


def operands(dtype, tokens=9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results_and_gradients(masked, scale, monkeypatch):
    mask = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1)) if masked else None
    values = operands(torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in values]
    want = F.scaled_dot_product_attention(*exact, None if mask is None else mask.double(), scale=scale)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*values, mask, scale=scale)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    pairs = zip(
        (y, *torch.autograd.grad(y, values, g)), (want, *torch.autograd.grad(want, exact, g.double())), strict=True
    )
    for got, right in pairs:
        assert got.dtype == torch.bfloat16
        assert (got - right).norm() <= 2**-6 * right.norm()  # a few roundings to 2**-9


@pytest.mark.parametrize("option", ["float32", "a gradient of the mask", "causal", "many tokens"])
def test_what_stays_with_pytorch(option, monkeypatch):
    values, options = operands(torch.float32 if option == "float32" else torch.bfloat16), {}
    mask = torch.randn(9, 9).bfloat16().requires_grad_() if option == "a gradient of the mask" else None
    options["is_causal"] = option == "causal"
    if option == "many tokens":
        monkeypatch.setattr(module, "MOST_WEIGHTS", 80)
    want = F.scaled_dot_product_attention(*values, mask, **options)
    monkeypatch.setattr(module._Attention, "apply", None)
    assert torch.equal(attention(*values, mask, **options), want)
