"""Passes over channels-last images that are not convolutions, against float64 and PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attacks.engine.executors.helpers import ISAS, Pointer, Result, first, last, pack, pointers, unpack
from tests.ops.cases import DTYPES, UNIT
from twins_fast.attacks.engine.activations import KINDS, Activation, value_and_slope
from twins_fast.attacks.engine.windows import adaptive, copied, moved, pooled
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
        at = x[len(x) - count :]
        wanted = value_and_slope(Activation(kind, a, b), at.double())
        if kind == "hardswish":  # PyTorch 2.6 has other slopes at the kinks
            wanted[1][at == -3], wanted[1][at == 3] = 0, 1
        for got, want, allowed in zip((y.get(), slope.get()), wanted, (3e-7, 3e-6), strict=True):
            error = (got.double() - want).abs() / (1 + want.abs())
            numbers = ~at.isnan()
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
    run("max_pool", *shape, *pointers(x, y.tensor, argmax.tensor), threads=threads, isa=isa)
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
            run("max_pool_backward", *shape, *pointers(g, argmax, *operands, dx.tensor), threads=2, isa=isa)
            both = (last(want) + other.float()).where(keep.view(other.shape), 0)
            assert torch.equal(dx.get().float(), both if use else last(want))


SUMS = [  # size, results, and the windows of an axis
    *(
        (size, sizes(size, kernel, stride, (0, 0)), kernel, stride, (0, 0), True)
        for size, kernel, stride, _ in GEOMETRIES
    ),
    ((70, 60), (1, 1), (70, 60), (1, 1), (0, 0), True),
    ((7, 6), (4, 3), (3, 3), (2, 2), (1, 1), True),
    ((7, 6), (4, 4), (3, 3), (2, 2), (1, 1), False),  # the last column's window sticks out
    ((5, 9), (2, 4), None, None, None, "adaptive"),
    ((2, 3), (7, 7), None, None, None, "adaptive"),
    ((3, 4), (6, 10), None, None, None, "copied"),
    ((5, 6), (7, 3), None, None, None, "moved"),
]


def axes_of(size, results, kernel, stride, pad, how):
    """Windows of rows and columns."""
    if how == "adaptive":
        return [adaptive(*pair) for pair in zip(size, results, strict=True)]
    if how == "moved":
        return [moved(size[0], results[0], -2), moved(size[1], results[1], 1, 2)]
    if how == "copied":
        return [copied(n, [i * n // big for i in range(big)]) for n, big in zip(size, results, strict=True)]
    return [pooled(*numbers, how) for numbers in zip(size, results, kernel, stride, pad, strict=True)]


def by_pytorch(x, results, kernel, stride, pad, how):
    if how == "adaptive":
        return F.adaptive_avg_pool2d(x, results)
    if how == "moved":
        return F.pad(x, (-1, 0, 2, 0))[..., ::2]
    if how == "copied":
        return F.interpolate(x, results, mode="nearest")
    size = sizes(x.shape[2:], kernel, stride, pad)
    return F.avg_pool2d(x, kernel, stride, pad, ceil_mode=size != results, count_include_pad=how)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 33, 64, 72])
def test_sums_over_windows(channels, dtype, isa):
    torch.manual_seed(channels)
    for size, results, *rest in SUMS:
        x = last(torch.randn(2, channels, *size).to(dtype))
        axes = axes_of(size, results, *rest)
        tables = [torch.tensor([axis.begin, axis.end], dtype=torch.int32) for axis in axes]
        weights = [torch.tensor(axis.weight) for axis in axes]
        shape = (2, channels, *size, *results, *pointers(*tables, *weights), dtype_name(dtype))
        y = Result((2, *results, channels), dtype)
        run("sum_pool", *shape, *pointers(x, y.tensor), threads=2, isa=isa)
        leaf = first(x).double().requires_grad_()
        want = by_pytorch(leaf, results, *rest)
        assert want.shape[2:] == results
        close(first(y.get()), want, 4 * by_pytorch(leaf.abs(), results, *rest), dtype)

        g, other = torch.randn(y.tensor.shape).to(dtype), torch.randn(x.shape).to(dtype)
        keep = torch.rand(x.numel() // channels, channels) < 0.7
        grad, magnitude = (
            last(torch.autograd.grad(want, leaf, first(t).double(), retain_graph=True)[0]) for t in (g, g.abs())
        )
        for use in (False, True):
            dx = other.clone()  # in place of other
            operands = (dx, pack(keep)) if use else (None, None)
            run("sum_pool_backward", *shape, *pointers(g, *operands, dx), threads=2, isa=isa)
            both = (grad + other.double()).where(keep.view(x.shape), 0)
            close(dx, both if use else grad, 2 * magnitude + other.double().abs(), dtype)


def table(parts):
    """As the kernel reads it: (x or None, first channel, step, channels, first and step in the result)."""
    rows = [
        (x.data_ptr() + first * x.itemsize if x is not None else 0, x.shape[1] if x is not None else 1, *rest)
        for x, first, *rest in parts
    ]
    return Pointer(torch.tensor(rows)), len(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype, isa):
    """Parts that are dense, with steps, in turn, or zeros; what is around them is as for one tensor."""
    torch.manual_seed(0)
    for pixels, widths in ((300, (3, 40, 5)), (2, (64, 200, 1)), (0, (8, 8, 8)), (9000, (1, 2, 3))):
        a, b, c = (integers(pixels, n).to(dtype) for n in widths)
        n, m, k = widths
        layouts = [
            ([(a, 0, 1, n, 0, 1), (b, 0, 1, m, n, 1), (c, 0, 1, k, n + m, 1)], torch.cat([a, b, c], 1)),
            ([(None, 0, 1, k, 0, 1), (b, m // 2, 1, m - m // 2, k, 1)],
             torch.cat([torch.zeros_like(c), b[:, m // 2 :]], 1)),
            ([(b, 0, 1, m, 0, 2), (b, 0, 1, m, 1, 2)], b.repeat_interleave(2, 1)),
            ([(b, 0, 2, m // 2, 0, 1), (None, 0, 1, m // 2, m // 2, 1)],
             torch.cat([b[:, ::2], torch.zeros_like(b[:, : m // 2])], 1)),
        ]  # fmt: skip
        for number, (parts, plain) in enumerate(layouts):
            channels = plain.shape[1]
            if not channels or (number == 3 and m % 2):
                continue
            scale, shift, other = integers(channels), integers(channels), integers(pixels, channels).to(dtype)
            keep = torch.rand(pixels, channels) < 0.6
            for flags in (0, 1, 2, 7):
                norm, relu, both = (bool(flags & 1 << i) for i in range(3))
                y = Result((pixels, channels), dtype)
                bits = Result((pixels, (channels + 7) // 8), torch.uint8)
                around = (scale if norm else None, shift if norm else None, other if both else None)
                mask = pack(keep) if both else None
                results = (relu, *pointers(y.tensor, bits.tensor if relu else None))
                arguments = (*table(parts), *pointers(*around, mask), *results)
                run("gather", pixels, channels, dtype_name(dtype), *arguments, threads=2, isa=isa)
                want = plain.float() * scale + shift if norm else plain.float()
                want = want + other.float() if both else want
                passes = ~(want <= 0)
                want = want.where(passes, 0) if relu else want
                assert torch.equal(y.get().float(), want.where(keep, 0) if both else want)
                assert not relu or torch.equal(bits.get(), pack(passes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_products_and_their_gradients(channels, dtype, isa):
    torch.manual_seed(channels)
    for images, pixels in ((3, 1), (2, 49), (1, 300), (0, 5)):
        x, g, other = (integers(images, pixels, channels, most=2).to(dtype) for _ in range(3))
        keep = torch.rand(images * pixels, channels) < 0.6
        for per_channel in (True, False):
            lies = (images, 1, channels) if per_channel else (images, pixels, 1)
            gate, summand = integers(*lies, most=2).to(dtype), integers(*lies).to(dtype)
            shape = (images, pixels, channels, per_channel, dtype_name(dtype))
            for around, relu in ((False, False), (True, False), (True, True)):
                y, bits = Result(x.shape, dtype), Result((images * pixels, (channels + 7) // 8), torch.uint8)
                operands = pointers(x, gate, other if around else None, pack(keep) if around else None)
                results = (relu, *pointers(y.tensor, bits.tensor if relu else None))
                run("product", *shape, *operands, *results, threads=2, isa=isa)
                want = x.float() * gate.float() + (other.float() if around else 0)
                passes = ~(want <= 0)
                want = want.where(passes, 0) if relu else want
                want = want.where(keep.view(x.shape), 0) if around else want
                assert torch.equal(y.get().float(), want)
                assert not relu or torch.equal(bits.get(), pack(passes.view(-1, channels)))
            kept = torch.rand(lies) < 0.6
            for around in (False, True):
                dgate = Result(lies, dtype)
                bits = pack(kept.view(-1, lies[2])) if around else None
                operands = pointers(g, x, summand if around else None, bits)
                run("product_sum", *shape, *operands, *pointers(dgate.tensor), threads=3, isa=isa)
                want = (g.float() * x.float()).sum(1 if per_channel else 2, keepdim=True)
                want = (want + summand.float()).where(kept, 0) if around else want
                assert torch.equal(dgate.get(), want.to(dtype))


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
        run("max_pool_backward", *shape, *pointers(last(g), argmax, None, None, dx.tensor), threads=threads)
        assert torch.equal(first(y), want) and torch.equal(first(dx.get()), grad)


def test_ceil_mode_and_absent_argmax():
    x = torch.randn(1, 4, 6, 6)
    want = F.max_pool2d(x, 3, 2, ceil_mode=True)
    y = torch.empty(1, 3, 3, 4)
    run("max_pool", 1, 4, 6, 6, 3, 3, 3, 3, 2, 2, 0, 0, "float32", *pointers(last(x), y, None))
    assert torch.equal(first(y), want)


def test_what_is_refused():
    x, y = torch.zeros(64), torch.zeros(64)
    refused = "argument out of range"

    def max_pool(*shape, target=y):
        return _C.max_pool_cpu(*shape, "float32", *pointers(x, target, None), 1, "")

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
    assert _C.max_pool_backward_cpu(*shape, *pointers(x, None, None, None, y), 1, "") == refused  # without argmax

    def sums(begin, end):
        axis, weights = torch.tensor([begin, end], dtype=torch.int32), torch.ones(2)
        shape = (1, 1, 4, 4, 2, 2, *pointers(axis, axis, weights, weights), "float32")
        return _C.sum_pool_cpu(*shape, *pointers(x, y), 1, "")

    assert sums([0, 2], [2, 4]) == ""
    for begin, end in (([0, 2], [2, 5]), ([-1, 2], [2, 4]), ([2, 0], [4, 4]), ([0, 0], [2, 1]), ([0, 3], [2, 2])):
        assert sums(begin, end) == refused

    def gather(*places, channels=4, other=None):
        parts = table([(x.view(16, 4), 0, *places)])
        around = pointers(None, None, other, None)
        return _C.gather_cpu(16, channels, "float32", *parts, *around, False, *pointers(y, None), 1, "")

    assert gather(1, 4, 0, 1) == ""
    assert gather(1, 4, 1, 1) == refused  # past the result's channels
    assert gather(1, 3, 0, 1) == refused  # not all of them
    assert gather(1, 4, 0, 1, other=y) == refused  # overwritten before it is read
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
