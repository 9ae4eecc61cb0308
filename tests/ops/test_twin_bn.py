"""Two-wing batch norm: every backend of this machine against the float64 reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings

from tests.ops.cases import DTYPES, EPS, FORMATS, MOMENTUM, UNIT, Case, check_phases, random_cases, splits
from twins_fast import ops
from twins_fast.ops import backend, layout, reference
from twins_fast.ops import native as kernels
from twins_fast.ops.wing import Wing

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
compiled = pytest.mark.skipif(kernels._C is None, reason="no compiled module")
with_cuda = pytest.mark.skipif(not getattr(kernels._C, "has_cuda", False), reason="built without nvcc")
BACKENDS = [
    pytest.param("cpp", "cpu", marks=compiled),
    ("torch", "cpu"),
    pytest.param("cuda", "cuda", marks=[*gpu, with_cuda]),
    pytest.param("triton", "cuda", marks=gpu),
    pytest.param("torch", "cuda", marks=gpu),
]
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 31, 7, 7), (2, 16, 40, 41), (3, 64, 16, 16)]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, memory_format, dtype, name, device):
    if name == "torch" and dtype == torch.float16:
        pytest.skip("PyTorch's own rounding")
    for split in splits(shape):
        for residual, relu in ((False, False), (True, True), (False, True)):
            case = Case(shape, split, dtype, memory_format, residual, relu, device)
            with backend.use_backend(name):
                results = case.run()
            case.check(results, name)
            assert results[0].is_contiguous(memory_format=memory_format)
            if split == shape[0]:
                assert all(torch.equal(a, b) for a, b in zip(results[7:9], case.adaptive[:2], strict=True))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[2:5], ids=str)
def test_two_adaptive_halves(shape, memory_format, dtype, name, device):
    if name == "torch" and dtype == torch.float16:
        pytest.skip("PyTorch's own rounding")
    for split in splits(shape, both_adaptive=True):
        case = Case(shape, split, dtype, memory_format, split != 1, split != 0, device, both_adaptive=True)
        with backend.use_backend(name):
            results = case.run()
        case.check(results, name)
        assert results.y.is_contiguous(memory_format=memory_format)
        if split == 0:
            assert all(torch.equal(a, b) for a, b in zip(results[9:], case.frozen[:2], strict=True))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_two_adaptive_halves_are_one_call_each(name, device):
    """What the halves hold does not reach the other one, NaN least of all."""
    case = Case((6, 5, 3, 3), 2, torch.float32, torch.channels_last, True, True, device, both_adaptive=True)
    case.x[1, 3, 1, 1] = torch.nan
    with backend.use_backend(name):
        both = case.run()
        for rows, wing in ((slice(2), case.frozen), (slice(2, None), case.adaptive)):
            half = copy.copy(case)
            half.both_adaptive, half.split, half.adaptive = False, 0, wing
            half.x, half.residual, half.dy = (t[rows] for t in (case.x, case.residual, case.dy))
            alone = half.run()
            for got, want in zip((both.y, both.dx, both.dresidual), alone[:3], strict=True):
                torch.testing.assert_close(got[rows], want, rtol=1e-5, atol=1e-6, equal_nan=True)
            statistics = both[9:] if wing is case.frozen else both[7:9]
            torch.testing.assert_close(list(statistics), list(alone[7:9]), rtol=1e-5, atol=1e-6, equal_nan=True)


@compiled
def test_two_adaptive_halves_may_run_again_before_their_backward_pass():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.channels_last, False, True)
    x = case.x.clone().requires_grad_()
    leaf = torch.ones(3, requires_grad=True)
    products = [leaf * wing[0] for wing in (case.frozen, case.adaptive)]  # save what is written to
    for _ in range(2):
        y = ops.twin_batch_norm(x, 2, case.frozen, case.adaptive, MOMENTUM, EPS, both_adaptive=True)
        (y * case.dy).sum().backward()
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@settings(max_examples=150, deadline=None)
@given(case=random_cases())
def test_any_call(name, device, case):
    assume(name != "torch" or case.dtype != torch.float16)  # PyTorch's own rounding
    case = case.to(device)
    with backend.use_backend(name):
        case.check(case.run(), name)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@settings(max_examples=100, deadline=None)
@given(case=random_cases())
def test_phases_of_any_call(name, device, case):
    check_phases(backend.implementation(name), case.to(device))


@compiled
@pytest.mark.parametrize("isa", getattr(kernels._C, "cpu_isas", []))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_each_instruction_set(isa, memory_format, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_isa", isa)
    # The second is large enough for results to go past the caches.
    for shape in (4, 19, 9, 11), (4, 32, 144, 256):
        case = Case(shape, 1, dtype, memory_format, True, True)
        case.check(case.run(), "cpp")


@compiled
@pytest.mark.parametrize("isa", getattr(kernels._C, "cpu_isas", []))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_pytorch_does(isa, dtype, monkeypatch):
    """Sums of all half-precision numbers and a fraction of their spacing, ties among them."""
    monkeypatch.setattr(kernels, "cpu_isa", isa)
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    if dtype == torch.bfloat16:  # its subnormal numbers may be flushed to zero
        x = x.where(x.float().abs() >= 2.0**-120, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    for fraction in (0.0, 0.25, 0.5, 0.75, -0.5):
        residual = (x.float() * fraction * 2 * UNIT[dtype]).to(dtype)
        y = ops.twin_batch_norm(x, 1, Wing(zero, one), Wing(), 0.1, 0.0, residual)
        want = (x.float() + residual.float()).to(dtype)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y[~y.isnan()], want[~want.isnan()])


@compiled
def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_isa", "mmx")
    with pytest.raises(RuntimeError, match="instruction set"):
        Case((4, 3, 2, 2), 2, torch.float32, FORMATS[0], False, False).run()


@pytest.mark.parametrize("both_adaptive", [False, True])
def test_reference_is_two_batch_norms_to_the_bit(both_adaptive):
    case = Case((4, 5, 6, 7), 2, torch.float32, torch.contiguous_format, False, False, both_adaptive=both_adaptive)

    def plain(x, split, frozen, adaptive, momentum, eps, residual, relu, both_adaptive=False):
        first = F.batch_norm(x[:split], *frozen, both_adaptive, momentum, eps)
        return torch.cat([first, F.batch_norm(x[split:], *adaptive, True, momentum, eps)])

    for a, b in zip(case.run(reference.twin_batch_norm), case.run(plain), strict=True):
        assert a is b is None or torch.equal(a, b)
    with backend.use_backend("torch"):
        for a, b in zip(case.run(), case.run(plain), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("split", [0, 1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_the_reference(split, relu):
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 2, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(x, residual, a, b, c, d):
        adaptive = Wing(mean.clone(), var.clone(), c, d)
        return reference.twin_batch_norm(x, split, Wing(mean, var, a, b), adaptive, MOMENTUM, EPS, residual, relu)

    assert torch.autograd.gradcheck(f, (x, residual, *weights))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_strided_inputs_and_gradients(name, device):
    base = Case((4, 6, 5, 8), 2, torch.float32, torch.contiguous_format, True, True, device)
    x, dy = base.x, base.dy
    expanded = base.residual[:, :, :, :1].expand_as(x)
    views = {
        "every second column": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(3)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "inside NaNs": lambda t: F.pad(t, (0, 0, 0, 0, 0, 0, 1, 1), value=torch.nan)[1:-1],
    }
    base.residual = expanded
    with backend.use_backend(name):
        base.check(base.run(), name)
        for make in views.values():
            for strided_x, strided_dy in ((make(x), dy), (x, make(dy)), (make(x), make(dy))):
                case = copy.copy(base)
                case.x, case.dy = strided_x, strided_dy
                leaf = strided_x.detach().requires_grad_()  # run() would make a dense copy
                y = ops.twin_batch_norm(
                    leaf, 2, base.frozen, [t.clone() for t in base.adaptive], MOMENTUM, EPS, expanded, True
                )
                (dx,) = torch.autograd.grad(y, leaf, strided_dy)
                want = base.run()
                torch.testing.assert_close(y, want[0], rtol=1e-5, atol=1e-5)  # another order of the same sums
                torch.testing.assert_close(dx, want[1], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_writes_all_of_its_results_and_nothing_else(dtype, memory_format, monkeypatch):
    guards = []

    def guarded(tensors):
        views = []
        for t in tensors:
            poison, fence = (255, 77) if t.dtype == torch.uint8 else (torch.nan, 77.0)
            buffer = torch.full((t.numel() + 64,), fence, dtype=t.dtype)
            inner = buffer[32 : 32 + t.numel()]
            inner.fill_(poison)
            guards.append((buffer, inner))
            views.append(inner.as_strided(t.shape, t.stride(), inner.storage_offset()))
        return views

    forward, backward = layout.forward_results, layout.backward_results
    monkeypatch.setattr(layout, "forward_results", lambda *a: tuple(guarded(forward(*a))))
    monkeypatch.setattr(layout, "backward_results", lambda *a: guarded(backward(*a)))
    # The second is large enough for results to go past the caches.
    for shape in (3, 13, 5, 5), (3, 32, 256, 176):
        case = Case(shape, 1, dtype, memory_format, True, True)
        case.check(case.run(), "cpp")
    assert len(guards) == 2 * 9
    for buffer, inner in guards:
        assert (buffer[:32] == 77).all() and (buffer[32 + inner.numel() :] == 77).all()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_constant_channel_with_a_large_mean(name, device, memory_format):
    x = torch.full((4, 9, 33, 17), 300.0, dtype=torch.bfloat16, device=device).contiguous(memory_format=memory_format)
    x[:, 1] = -7.0
    one, zero = torch.ones(9, device=device), torch.zeros(9, device=device)
    adaptive = Wing(zero.clone(), one.clone(), one, one * 0.5)
    with backend.use_backend(name):
        y = ops.twin_batch_norm(x, 0, Wing(), adaptive, 1.0, EPS)
    # The variance is 0, so that rstd = 316 multiplies any error of the mean: float32 keeps it below
    # 316 * 300 * 2^-24 = 0.006 for one rounding, and bf16 rounds 0.5 by at most 0.002.
    limit = 0.008 if name != "torch" else 0.05
    assert (y.double() - 0.5).abs().max() <= limit
    torch.testing.assert_close(adaptive.running_mean, torch.where(torch.arange(9, device=device) == 1, -7.0, 300.0))
    assert adaptive.running_var.abs().max() <= 1e-4  # of 300^2


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_nan_stays_in_its_channel(name, device):
    case = Case((4, 5, 3, 3), 2, torch.float32, torch.channels_last, False, True, device)
    case.x[3, 2, 1, 1] = torch.nan
    case.x[0, 4, 1, 1] = torch.nan
    with backend.use_backend(name):
        y = case.run()[0]
    assert y[2:, 2].isnan().all() and y[0, 4, 1, 1].isnan()
    assert y.isnan().sum() == 2 * 9 + 1


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_deterministic(name, device, memory_format):
    case = Case((8, 24, 33, 33), 4, torch.float32, memory_format, True, True, device)
    with backend.use_backend(name):
        first, second = case.run(), case.run()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in (3, 3, 1, 1), (5, 24, 33, 33), (2, 1000, 7, 7):
            for memory_format in FORMATS:
                case = Case(shape, 1, torch.float32, memory_format, True, True, seed=9)
                case.check(case.run(), "cpp")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_variance_with_an_outlier_first(name, device, memory_format):
    case = Case((4, 64, 16, 16), 0, torch.float32, memory_format, False, False, device)
    case.x[0, :, 0, 0] += 100
    with backend.use_backend(name):
        case.check(case.run(), name)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("split", [0, 4])
def test_a_wing_without_rows_has_no_gradient(name, device, split):
    case = Case((4, 3, 5, 5), split, torch.float32, torch.contiguous_format, False, True, device)
    leaves = [t.clone().requires_grad_() for wing in (case.frozen, case.adaptive) for t in wing[2:]]
    wings = Wing(*case.frozen[:2], *leaves[:2]), Wing(*case.adaptive[:2], *leaves[2:])
    with backend.use_backend(name):
        ops.twin_batch_norm(case.x, split, *wings, MOMENTUM, EPS, relu=True).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [split == 0] * 2 + [split == 4] * 2


@compiled
@pytest.mark.filterwarnings("ignore")  # a trace depends on sizes, and script is deprecated
def test_what_watches_a_call_sees_it():
    """Calls that go past the dispatcher would leave uninitialised results in a trace."""
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, False, False)

    def call(x):
        adaptive = (*(t.clone() for t in case.adaptive[:2]), *case.adaptive[2:])
        return ops.twin_batch_norm(x, 2, case.frozen, adaptive, MOMENTUM, EPS)

    want = call(case.x)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(call, case.x)(case.x), want)
        for pre_dispatch in (False, True):
            graph = torch.fx.experimental.proxy_tensor.make_fx(call, pre_dispatch=pre_dispatch)(case.x)
            assert torch.equal(graph(case.x), want)
    negative = torch._neg_view(-case.x)
    assert torch.equal(call(negative), want)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Exception, match="jvp|forward"):
        call(torch.autograd.forward_ad.make_dual(case.x, case.x))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_only_wanted_gradients(name, device):
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, True, True, device)
    with backend.use_backend(name):
        want = case.run()
        for i in range(6):
            x, residual = case.x.clone(), case.residual.clone()
            frozen, adaptive = ([t.clone() for t in wing] for wing in (case.frozen, case.adaptive))
            leaf = [x, residual, frozen[2], frozen[3], adaptive[2], adaptive[3]][i].requires_grad_()
            y = ops.twin_batch_norm(x, 2, frozen, adaptive, MOMENTUM, EPS, residual, True)
            (grad,) = torch.autograd.grad(y, leaf, case.dy)
            assert torch.equal(grad, want[1 + i])
        with torch.no_grad():
            y = ops.twin_batch_norm(case.x, 2, case.frozen, case.adaptive, MOMENTUM, EPS, case.residual, True)
        assert not y.requires_grad and torch.equal(y, want[0])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_without_weights_and_running_statistics(name, device):
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, False, False, device)
    x = case.x.clone().requires_grad_()
    frozen = Wing(*case.frozen[:2])
    with backend.use_backend(name):
        y = ops.twin_batch_norm(x, 2, frozen, Wing(), MOMENTUM, EPS)
        (dx,) = torch.autograd.grad(y, x, case.dy)
    want = reference.twin_batch_norm(x, 2, frozen, Wing(), MOMENTUM, EPS)
    (want_dx,) = torch.autograd.grad(want, x, case.dy)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-5)


@compiled
def test_double_backward_raises():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, False, False)
    x = case.x.clone().requires_grad_()
    y = ops.twin_batch_norm(x, 2, case.frozen, case.adaptive, MOMENTUM, EPS)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@compiled
def test_autograd_sees_the_running_statistics_change():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, False, False)
    mean = case.adaptive[0]
    leaf = torch.ones(3, requires_grad=True)
    product = leaf * mean  # saves mean
    ops.twin_batch_norm(case.x, 2, case.frozen, case.adaptive, MOMENTUM, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_float64_uses_the_reference():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, True, True)
    case.x, case.residual, case.dy = (t.double() for t in (case.x, case.residual, case.dy))
    case.frozen, case.adaptive = ([t.double() for t in wing] for wing in (case.frozen, case.adaptive))
    for a, b in zip(case.run(), case.run(reference.twin_batch_norm), strict=True):
        assert a is b is None or torch.equal(a, b)
    if kernels._C is not None:
        with backend.use_backend("cpp"), pytest.raises(RuntimeError, match="no kernel"):
            case.run()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, device, dtype):
    case = Case((4, 3, 5, 5), 2, dtype, torch.contiguous_format, False, False, device)
    case.frozen, case.adaptive = ([t.to(dtype) for t in wing] for wing in (case.frozen, case.adaptive))
    with backend.use_backend(name):
        results = case.run()
    exact = copy.copy(case)
    exact.frozen, exact.adaptive = ([t.float() for t in wing] for wing in (case.frozen, case.adaptive))
    for got, want in zip(results, exact.run(reference.twin_batch_norm), strict=True):
        assert got is want is None or got.dtype == dtype
        if got is not None:
            torch.testing.assert_close(got.float(), want.float(), rtol=8 * UNIT[dtype], atol=32 * UNIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    case = Case((4, 3, 5, 5), 2, dtype, torch.contiguous_format, True, True)
    plain = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.run()
    pairs = zip(plain, cast, strict=True)
    assert all(a is b is None or (torch.equal(a, b) and a.dtype == b.dtype) for a, b in pairs)


@compiled
@pytest.mark.parametrize("overload", ["default", "both_adaptive"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, overload):
    case = Case((4, 5, 3, 3), 2, torch.float32, memory_format, True, True)
    args = (case.x, case.residual, 2, *case.frozen, *case.adaptive, MOMENTUM, EPS, True, True, "cpp")
    forward = getattr(torch.ops.twins_fast.twin_bn_forward, overload)
    torch.library.opcheck(forward, args)
    _, bits, stats = forward(*args)
    vectors = (*case.frozen[:3], case.adaptive[2], stats)
    args = (case.dy, case.x, bits, 2, *vectors, EPS, [True] * 6, "cpp")
    torch.library.opcheck(torch.ops.twins_fast.twin_bn_backward.default, args)


@compiled
@pytest.mark.parametrize("both_adaptive", [False, True])
def test_compiles_to_one_graph(both_adaptive):
    case = Case((4, 5, 3, 3), 2, torch.float32, torch.channels_last, True, True, both_adaptive=both_adaptive)
    traced = torch.compile(ops.twin_batch_norm, fullgraph=True, backend="aot_eager")
    pairs = zip(case.run(), case.run(traced), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("kind", [list, tuple, lambda vectors: Wing(*vectors)])
def test_a_wing_is_any_sequence_of_its_vectors(kind, name, device):
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, True, True, device)

    def call(x, split, frozen, adaptive, *rest):
        return ops.twin_batch_norm(x, split, kind(frozen), kind(adaptive), *rest)

    with backend.use_backend(name):
        pairs = zip(case.run(call), case.run(), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def arguments(**changes):
    values = dict(
        x=torch.randn(4, 3, 2, 2),
        split=2,
        frozen=(torch.zeros(3), torch.ones(3), None, None),
        adaptive=(torch.zeros(3), torch.ones(3), None, None),
        momentum=MOMENTUM,
        eps=EPS,
    )
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor"),
        (dict(x=torch.randn(4, 3, 2)), ValueError, r"\[N, C, H, W\].*\(4, 3, 2\)"),
        (dict(x=torch.ones(4, 3, 2, 2, dtype=torch.int32)), TypeError, "x must be float32.*int32"),
        (dict(x=torch.randn(0, 3, 2, 2), split=0), ValueError, "empty"),
        (dict(split=5), ValueError, r"split must be in \[0, 4\], got 5"),
        (dict(split=-1), ValueError, "split"),
        (dict(split=2.0), TypeError, "split must be an int"),
        (dict(split=True), TypeError, "split must be an int"),
        (dict(x=torch.randn(4, 3, 1, 1), split=3), ValueError, "at least 2 values per channel"),
        (dict(momentum=1.5), ValueError, "momentum.*1.5"),
        (dict(momentum=None), TypeError, "momentum"),
        (dict(momentum=float("nan")), ValueError, "momentum"),
        (dict(eps=-1e-5), ValueError, "eps"),
        (dict(eps="small"), TypeError, "eps"),
        (dict(eps=0.0), ValueError, "eps must be > 0"),
        (dict(adaptive=(torch.zeros(1).expand(3), torch.ones(3), None, None)), ValueError, "expanded"),
        (dict(adaptive=(torch.zeros(3, requires_grad=True), torch.ones(3), None, None)), ValueError, "gradient"),
        (dict(relu=1), TypeError, "relu"),
        (dict(both_adaptive=1), TypeError, "both_adaptive must be a bool, got 1"),
        (dict(both_adaptive=True, eps=0.0, split=4), ValueError, "eps must be > 0"),
        (dict(both_adaptive=True, x=torch.randn(4, 3, 1, 1), split=1), ValueError, "got 1 row.*N=4, split=1"),
        (dict(both_adaptive=True, x=torch.randn(4, 3, 1, 1), split=3), ValueError, "got 1 row.*N=4, split=3"),
        (dict(both_adaptive=True, split=5), ValueError, r"split must be in \[0, 4\], got 5"),
        (dict(frozen=(None,) * 4), ValueError, "frozen running_mean and running_var"),
        (dict(frozen=(torch.zeros(3), None, None, None)), ValueError, "both"),
        (dict(frozen=(torch.zeros(2), torch.ones(3), None, None)), ValueError, r"frozen running_mean.*\(3,\).*\(2,\)"),
        (dict(frozen=(torch.zeros(3), torch.ones(3))), TypeError, "frozen must be"),
        (dict(frozen=(torch.zeros(3).double(), torch.ones(3), None, None)), TypeError, "frozen running_mean"),
        (dict(frozen=(torch.zeros(3), torch.ones(3), 1.0, None)), TypeError, "frozen weight"),
        (dict(frozen=(torch.zeros(3), torch.ones(3, device="meta"), None, None)), ValueError, "meta"),
        (dict(residual=torch.randn(4, 3, 2, 1)), ValueError, "residual must have shape"),
        (dict(residual=torch.randn(4, 3, 2, 2).double()), TypeError, "residual must be torch.float32"),
        (dict(residual=torch.randn(4, 3, 2, 2, device="meta")), ValueError, "residual must be on cpu"),
        (dict(residual=1.0), TypeError, "residual"),
    ],
)
def test_invalid_arguments_are_named_and_nothing_is_written(changes, error, message):
    values = arguments(**changes)
    with pytest.raises(error, match=message):
        ops.twin_batch_norm(**values)
    assert torch.equal(values["adaptive"][0], torch.zeros(3)) and torch.equal(values["adaptive"][1], torch.ones(3))


def test_two_adaptive_halves_need_no_running_statistics():
    values = arguments(frozen=(None,) * 4, adaptive=(None,) * 4, both_adaptive=True)
    x = values["x"]
    want = torch.cat([F.batch_norm(half, None, None, training=True, eps=EPS) for half in (x[:2], x[2:])])
    torch.testing.assert_close(ops.twin_batch_norm(**values), want)


def test_report_gives_a_reason_for_every_better_backend():
    for row in backend.report():
        better = backend.BACKENDS[: backend.BACKENDS.index(row["backend"])]
        assert list(row["reasons"]) == list(better) and all(row["reasons"].values())


def test_forcing_a_backend(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    with backend.use_backend("torch"):
        assert backend.choose("twin_batch_norm", x) == "torch"
        assert backend.report()[0]["backend"] == "torch"
    with pytest.raises(ValueError, match="fortran"), backend.use_backend("fortran"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"), backend.use_backend("cuda"):
            pass
    monkeypatch.setattr(backend, "_forced", "fortran")  # as read from TWINS_FAST_BACKEND
    with pytest.raises(ValueError, match="fortran"):
        backend.choose("twin_batch_norm", x)


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(kernels, "_C", None)
    monkeypatch.setattr(kernels, "missing", "no compiler found")
    assert backend.choose("twin_batch_norm", torch.randn(2, 3, 4, 4)) == "torch"
    assert backend.report()[0]["reasons"]["cpp"] == "no compiler found"
    with pytest.raises(RuntimeError, match="no compiler found"), backend.use_backend("cpp"):
        pass
