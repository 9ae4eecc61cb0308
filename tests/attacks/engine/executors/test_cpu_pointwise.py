"""Passes over channels-last images that are not convolutions, against float64 and PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attacks.engine.executors.helpers import ISAS, Result, first, last, pack, pointers, unpack
from tests.ops.cases import DTYPES, UNIT
from twins_fast.attacks.engine.activations import KINDS, Activation, value_and_slope
from twins_fast.ops.native import _C, dtype_name

pytestmark = pytest.mark.skipif(_C is None, reason="no compiled module")
CHANNELS = [1, 3, 5, 8, 17, 33, 64, 200]


def run(function, *arguments, threads=1, isa=""):
    assert getattr(_C, f"{function}_cpu")(*arguments, threads, isa) == ""


def close(got, want, size, dtype):
    """Rounding to dtype once, and float32 sums of a few terms whose magnitudes add up to ``size``."""
    smallest = torch.finfo(dtype).smallest_normal
    allowed = UNIT[dtype] * want.abs() + 32 * UNIT[torch.float32] * size + smallest
    assert ((got.double() - want).abs() <= allowed).all()


def integers(*shape, most=4):
    """Exact in every dtype, as are their sums and products."""
    return torch.randint(-most, most + 1, shape).float()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_finish(channels, dtype, isa):
    torch.manual_seed(channels)
    for pixels in (0, 7, 300):
        x, other, gate = (integers(pixels, channels).to(dtype) for _ in range(3))
        if pixels:
            x[0, 0] = torch.nan
        bias, keep = integers(channels), torch.rand(pixels, channels) < 0.7
        for flags in range(32):
            use_bias, use_other, use_mask, relu, use_gate = (bool(flags & 1 << i) for i in range(5))
            y = Result((pixels, channels), dtype)
            bits = Result((pixels, (channels + 7) // 8), torch.uint8)
            b, o, m = bias if use_bias else None, other if use_other else None, pack(keep) if use_mask else None
            before = pointers(x, gate if use_gate else None, None, b, o, m)
            arguments = (*before, relu, *pointers(y.tensor, bits.tensor if relu else None))
            run("pointwise", pixels, channels, dtype_name(dtype), *arguments, threads=flags % 3 + 1, isa=isa)
            want = x.float() * (gate.float() if use_gate else 1)
            want = want + (b if use_bias else 0) + (o.float() if use_other else 0)
            passes = ~(want <= 0)
            want = want.where(passes, 0) if relu else want
            want = want.where(keep, 0) if use_mask else want
            assert torch.equal(y.get().float().nan_to_num(99), want.nan_to_num(99))
            if relu:
                assert torch.equal(bits.get(), pack(passes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_affine_and_its_gradient(channels, dtype, isa):
    torch.manual_seed(channels)
    pixels = 301
    x, other = (torch.randn(pixels, channels).to(dtype) for _ in range(2))
    scale, shift, keep = torch.randn(channels), torch.randn(channels), torch.rand(pixels, channels) < 0.5
    y, bits = Result(x.shape, dtype), Result((pixels, (channels + 7) // 8), torch.uint8)
    size = x.double().abs() * scale.double().abs() + shift.double().abs() + other.double().abs()
    shape = (pixels, channels, dtype_name(dtype))
    for relu in (True, False):
        results = pointers(y.tensor, bits.tensor if relu else None)
        arguments = (*pointers(x, None, scale, shift, None, None), relu, *results)
        run("pointwise", *shape, *arguments, threads=2, isa=isa)
        want = x.double() * scale.double() + shift.double()
        close(y.get(), want.relu() if relu else want, size, dtype)
    passes, padding_is_zero = unpack(bits.get(), channels)
    assert padding_is_zero
    sure = want.abs() > 1e-5 * size
    assert torch.equal(passes[sure], (want > 0)[sure])
    for flags in range(4):
        use_other, use_mask = (bool(flags & 1 << i) for i in range(2))
        dx = Result(x.shape, dtype)
        operands = (x, None, scale, None, other if use_other else None, pack(keep) if use_mask else None)
        run("pointwise", *shape, *pointers(*operands), False, *pointers(dx.tensor, None), threads=2, isa=isa)
        want = x.double() * scale.double() + (other.double() if use_other else 0)
        close(dx.get(), want.where(keep, 0) if use_mask else want, size, dtype)


NUMBERS = {"leaky relu": (0.1, 0), "elu": (1.3, 0), "clamp open": (0, 6), "clamp closed": (-1, 1)}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, dtype, isa):
    """Against PyTorch in float64: all over the range, near 0 and where they have kinks."""
    generator = torch.Generator().manual_seed(0)
    kinks = torch.tensor([0.0, -0.0, 6, -3, 3, 1, -1, 100, -100, 1e4, -1e4, torch.nan])
    near = torch.randn(1000, generator=generator) * torch.logspace(-6, 0, 1000)
    x = torch.cat([torch.linspace(-30, 30, 3001), near, kinks]).to(dtype)
    a, b = NUMBERS.get(kind, (0, 0))
    for count, threads in ((len(x), 1), (len(x), 3), (5, 1), (0, 2)):
        y, slope = Result((count,), dtype), Result((count,), dtype)
        arguments = (count, dtype_name(dtype), list(KINDS).index(kind), a, b)
        results = pointers(x[-count:] if count else x, y.tensor, slope.tensor)
        run("activation", *arguments, *results, threads=threads, isa=isa)
        wanted = value_and_slope(Activation(kind, a, b), x[len(x) - count :].double())
        for got, want, allowed in zip((y.get(), slope.get()), wanted, (3e-7, 3e-6), strict=True):
            error = (got.double() - want).abs() / (1 + want.abs())
            numbers = ~x[len(x) - count :].isnan()
            assert (error <= allowed + UNIT[dtype])[numbers].all()
        assert y.get().isnan().equal(~numbers)
    same = x.clone()
    run("activation", len(x), *arguments[1:], *pointers(same, same, torch.empty_like(x)), isa=isa)  # in place
    y = torch.empty_like(x)
    run("activation", len(x), *arguments[1:], *pointers(x, y, torch.empty_like(x)), threads=2, isa=isa)
    assert torch.equal(same.nan_to_num(9), y.nan_to_num(9))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [*CHANNELS, 768, 3001])
def test_layer_norm_and_its_gradient(channels, dtype, isa):
    """Against float64; a sum of float32 may be off by its rounding, once for each term that a lane adds up."""
    torch.manual_seed(channels)
    pixels, eps = 29, 1e-5
    roundings = (channels / 32 + 16) * UNIT[torch.float32]
    x = (torch.randn(pixels, channels) + 3).to(dtype)
    g, other = (torch.randn(pixels, channels).to(dtype) for _ in range(2))
    weight, bias = torch.randn(channels), torch.randn(channels)
    leaf, smallest = x.double().requires_grad_(), torch.finfo(dtype).smallest_normal
    sizes = (pixels, channels, dtype_name(dtype))
    mean = leaf.mean(1, keepdim=True)
    deviation = (leaf.var(1, correction=0, keepdim=True) + eps).rsqrt()
    normal = (leaf - mean) * deviation
    off = deviation * (leaf.abs() + leaf.abs().mean(1, keepdim=True)) + normal.abs()  # of normal, in roundings
    for w, b, threads in ((weight, bias, 1), (None, None, 3), (weight, None, 2)):
        y, moments = Result(x.shape, dtype), Result((pixels, 2), torch.float32)
        run("layer_norm", *sizes, eps, *pointers(x, w, b, y.tensor, moments.tensor), threads=threads, isa=isa)
        gain = torch.ones(channels, dtype=torch.float64) if w is None else w.double()
        want = normal * gain + (0 if b is None else b.double())
        size = off * gain.abs() + (0 if b is None else b.abs())
        assert ((y.get() - want).abs() <= UNIT[dtype] * want.abs() + roundings * size + smallest).all()
        exact = torch.cat([mean, deviation], 1)
        assert ((moments.get() - exact).abs() <= roundings * (exact.abs() + leaf.abs().mean(1, keepdim=True))).all()

        keep = torch.rand(pixels, channels) < 0.7
        (slope,) = torch.autograd.grad(want, leaf, g.double(), retain_graph=True)
        a = (g * gain).abs()
        size = a + a.mean(1, keepdim=True) + off * (a * normal.abs()).mean(1, keepdim=True)
        size = deviation * (size + normal.abs() * (a * off).mean(1, keepdim=True))
        for use in (False, True):
            dx = other.clone()  # in place of other
            operands = (dx, pack(keep)) if use else (None, None)
            arguments = pointers(g, x, w, moments.get(), *operands, dx)
            run("layer_norm_backward", *sizes, *arguments, threads=threads, isa=isa)
            both = (slope + other.double()).where(keep, 0) if use else slope
            allowed = UNIT[dtype] * both.abs() + 2 * roundings * (size + use * other.abs()) + smallest
            assert ((dx - both).abs() <= allowed).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 24, 64])
def test_in_place_and_the_number_of_threads(channels, dtype, isa):
    torch.manual_seed(0)
    pixels = 5000
    x, other, bias = (
        torch.randn(pixels, channels).to(dtype),
        torch.randn(pixels, channels).to(dtype),
        torch.randn(channels),
    )
    bits, wanted, y = torch.empty(pixels, (channels + 7) // 8, dtype=torch.uint8), None, torch.empty_like(x)
    for target in (None, x, other):
        for threads in (1, 2, 3):
            a, b = x.clone(), other.clone()
            result = y if target is None else a if target is x else b
            arguments = (*pointers(a, None, None, bias, b, None), True, *pointers(result, bits))
            run("pointwise", pixels, channels, dtype_name(dtype), *arguments, threads=threads, isa=isa)
            wanted = result.clone() if wanted is None else wanted
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_past_the_caches(dtype, isa):
    pixels, channels = 160000, 32
    x, bias = integers(1, channels).expand(pixels, -1).to(dtype).contiguous(), integers(channels)
    y = torch.full_like(x, torch.nan)
    run(
        "pointwise",
        pixels,
        channels,
        dtype_name(dtype),
        *pointers(x, None, None, bias, None, None),
        False,
        *pointers(y, None),
        threads=2,
        isa=isa,
    )
    assert torch.equal(y.float(), x.float() + bias)


GEOMETRIES = [  # size, kernel, stride, padding
    ((7, 9), (3, 3), (2, 2), (1, 1)),
    ((6, 6), (2, 2), (2, 2), (0, 0)),
    ((5, 8), (3, 2), (1, 1), (1, 0)),
    ((4, 7), (4, 7), (4, 7), (0, 0)),
    ((9, 5), (5, 3), (3, 2), (2, 1)),
    ((8, 7), (1, 2), (3, 3), (0, 1)),
]


def sizes(size, kernel, stride, pad):
    return tuple((s + 2 * p - k) // t + 1 for s, k, t, p in zip(size, kernel, stride, pad, strict=True))


def max_pool(x, geometry, threads=1, isa=""):
    size, kernel, stride, pad = geometry
    images, channels = x.shape[0], x.shape[3]
    out = sizes(*geometry)
    shape = (images, channels, *size, *out, *kernel, *stride, *pad, dtype_name(x.dtype))
    y, argmax = Result((images, *out, channels), x.dtype), Result((images, *out, channels), torch.uint8)
    run("pool_forward", *shape, True, *pointers(x, y.tensor, argmax.tensor), threads=threads, isa=isa)
    return shape, y.get(), argmax.get()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 33, 64, 72])
def test_max_pool(channels, dtype, isa):
    torch.manual_seed(channels)
    for geometry in GEOMETRIES:
        size, kernel, stride, pad = geometry
        x = integers(3, channels, *size).to(dtype)  # with many equal maxima
        x[1, 0, 0] = torch.nan
        x[2, 0] = -torch.inf
        x[0, 0] = torch.tensor([0.0, -0.0]).repeat(size[0] * size[1])[: size[0] * size[1]].view(size)
        wide = x.float()
        want, index = F.max_pool2d(wide, kernel, stride, pad, return_indices=True)
        shape, y, argmax = max_pool(last(x), geometry, threads=2, isa=isa)
        assert torch.equal(first(y).float().nan_to_num(99), want.nan_to_num(99))
        assert torch.equal(first(y).signbit() & ~first(y).isnan(), want.signbit() & ~want.isnan())
        out_y, out_x = (torch.arange(n) for n in want.shape[2:])
        row, column = index // size[1], index % size[1]
        place = (row - (out_y * stride[0] - pad[0])[:, None]) * kernel[1] + column - (out_x * stride[1] - pad[1])
        assert torch.equal(first(argmax).long(), place)

        g, other = integers(*y.shape).to(dtype), integers(3, *size, channels).to(dtype)
        keep = torch.rand(3 * size[0] * size[1], channels) < 0.7
        leaf = wide.clone().requires_grad_()
        (want,) = torch.autograd.grad(F.max_pool2d(leaf, kernel, stride, pad), leaf, first(g).float())
        for use in (False, True):
            dx = Result(other.shape, dtype)
            operands = (other, pack(keep)) if use else (None, None)
            run("pool_backward", *shape, True, *pointers(g, argmax, *operands, dx.tensor), threads=2, isa=isa)
            both = (last(want) + other.float()).where(keep.view(other.shape), 0)
            assert torch.equal(dx.get().float(), both if use else last(want))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 33, 64, 72])
def test_avg_pool(channels, dtype, isa):
    torch.manual_seed(channels)
    for size, kernel, stride, _ in [*GEOMETRIES, ((70, 60), (70, 60), (1, 1), (0, 0))]:
        x = last(torch.randn(2, channels, *size).to(dtype))
        out = sizes(size, kernel, stride, (0, 0))
        shape = (2, channels, *size, *out, *kernel, *stride, 0, 0, dtype_name(dtype))
        y = Result((2, *out, channels), dtype)
        run("pool_forward", *shape, False, *pointers(x, y.tensor, None), threads=2, isa=isa)
        leaf = first(x).double().requires_grad_()
        want = F.avg_pool2d(leaf, kernel, stride)
        magnitude = F.avg_pool2d(leaf.abs(), kernel, stride)
        close(first(y.get()), want, magnitude * (kernel[0] + kernel[1]) / 16, dtype)

        g, other = torch.randn(y.tensor.shape).to(dtype), torch.randn(x.shape).to(dtype)
        keep = torch.rand(x.numel() // channels, channels) < 0.7
        grad, magnitude = (
            last(torch.autograd.grad(want, leaf, first(t).double(), retain_graph=True)[0]) for t in (g, g.abs())
        )
        for use in (False, True):
            dx = other.clone()  # in place of other
            operands = (dx, pack(keep)) if use else (None, None)
            run("pool_backward", *shape, False, *pointers(g, None, *operands, dx), threads=2, isa=isa)
            both = (grad + other.double()).where(keep.view(x.shape), 0)
            close(dx, both if use else grad, magnitude + other.double().abs(), dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pooling(data):
    def pair(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(2))

    kernel, stride = pair(1, 5), pair(1, 4)
    pad = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(k + data.draw(st.integers(0, 6)) for k in kernel)
    geometry, channels = (size, kernel, stride, pad), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    x = integers(2, channels, *size)
    leaf = x.clone().requires_grad_()
    want = F.max_pool2d(leaf, kernel, stride, pad)
    g = integers(*want.shape)
    (grad,) = torch.autograd.grad(want, leaf, g)
    for threads in (1, 2, 3):
        shape, y, argmax = max_pool(last(x), geometry, threads)
        dx = Result((2, *size, channels), torch.float32)
        run("pool_backward", *shape, True, *pointers(last(g), argmax, None, None, dx.tensor), threads=threads)
        assert torch.equal(first(y), want) and torch.equal(first(dx.get()), grad)


def test_ceil_mode_and_absent_argmax():
    x = torch.randn(1, 4, 6, 6)
    want = F.max_pool2d(x, 3, 2, ceil_mode=True)
    y = torch.empty(1, 3, 3, 4)
    run("pool_forward", 1, 4, 6, 6, 3, 3, 3, 3, 2, 2, 0, 0, "float32", True, *pointers(last(x), y, None))
    assert torch.equal(first(y), want)


def test_what_is_refused():
    x, y = torch.zeros(64), torch.zeros(64)
    refused = "argument out of range"

    def max_pool(*shape, target=y):
        return _C.pool_forward_cpu(*shape, "float32", True, *pointers(x, target, None), 1, "")

    def pointwise(pixels, channels, dtype="float32", scale=None, bits=None, threads=1, isa=""):
        arguments = (*pointers(x, None, scale, None, None, None), False, *pointers(y, bits))
        return _C.pointwise_cpu(pixels, channels, dtype, *arguments, threads, isa)

    assert max_pool(1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0) == ""
    assert max_pool(1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0, target=x) == refused  # windows may overlap
    assert max_pool(1, 1, 4, 4, 4, 2, 2, 2, 2, 2, 0, 0) == refused  # a window outside the image
    assert max_pool(1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 2, 0) == refused  # a window of padding
    assert max_pool(1, 1, 16, 16, 1, 1, 16, 16, 1, 1, 0, 0) == refused  # 256 places
    assert max_pool(0, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0) == ""
    shape = (1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0, "float32")
    assert _C.pool_backward_cpu(*shape, True, *pointers(x, None, None, None, y), 1, "") == refused  # without argmax
    shape = (1, 1, 4, 4, 2, 2, 3, 3, 2, 2, 0, 0, "float32")
    assert _C.pool_forward_cpu(*shape, False, *pointers(x, y, None), 1, "") == refused  # a mean past the image
    assert pointwise(8, 8, bits=y) == refused  # without a ReLU
    assert pointwise(8, 0) == refused
    for kind, slope in ((12, y), (-1, y), (0, None), (0, x)):
        assert _C.activation_cpu(8, "float32", kind, 0, 0, *pointers(x, y, slope), 1, "") == refused
    layer_norm = (8, 8, "float32", 1e-5, *pointers(x, None, None, y, None))
    assert _C.layer_norm_cpu(*layer_norm, 1, "") == refused  # nowhere to keep the moments
    layer_norm = (8, 8, "float32", *pointers(y, x, None, x, None, None, x))
    assert _C.layer_norm_backward_cpu(*layer_norm, 1, "") == refused  # in place of its operand
    assert pointwise(8, 8, threads=0) == refused
    assert "instruction set" in pointwise(8, 8, scale=x, isa="mmx")
    with pytest.raises(ValueError, match="dtype"):
        pointwise(8, 8, dtype="float64")
