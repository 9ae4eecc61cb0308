"""The Triton kernels of two-wing batch norm: what they compute, and how they fill a device."""

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.interpreter import DEVICE, compiles_ahead, host, results, run_in_the_interpreter
from tests.ops.cases import DTYPES, EPS, FORMATS, MOMENTUM, Case, check_phases, random_cases, splits
from twins_fast import ops
from twins_fast.kernels import aot, tiles, tuning, twin_bn
from twins_fast.ops import backend, layout, phases, reference, triton
from twins_fast.ops.wing import Wing

# One program per channel of contiguous memory, one tile of 32 channels else: what takes time in the interpreter.
SHAPES = [(2, 1, 1, 2), (2, 129, 1, 1), (5, 3, 1, 31), (4, 7, 7, 7), (3, 9, 2, 1)]


@host
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, pytestconfig)


@results
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, memory_format):
    for both in (False, True):
        for i, split in enumerate(splits(shape, both)[1:-1] if both else splits(shape)):
            case = Case(shape, split, DTYPES[i % 3], memory_format, i % 2 == 0, i < 3, DEVICE, both_adaptive=both)
            with backend.use_backend("triton"):
                got = case.run()
            case.check(got, "triton")
            assert got[0].is_contiguous(memory_format=memory_format)
            if split == shape[0]:
                assert all(torch.equal(a, b) for a, b in zip(got[7:9], case.adaptive[:2], strict=True))


@pytest.mark.slow
@results
@settings(max_examples=60, deadline=None)
@given(case=random_cases(most_channels=9, most_pixels=6))
def test_phases_of_any_call(case):
    check_phases(triton, case.to(DEVICE))


@pytest.mark.slow
@results
@settings(max_examples=15, deadline=None)
@given(case=random_cases(most_channels=9, most_pixels=6))
def test_any_call(case):
    case = case.to(DEVICE)
    with backend.use_backend("triton"):
        case.check(case.run(), "triton")


@results
@pytest.mark.parametrize(
    "config",
    [(1024, 128, 8, 1), *(pytest.param(c, marks=pytest.mark.slow) for c in [(64, 8, 1, 12), (128, 16, 2, 3)])],
    ids=str,
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_any_block_sizes(config, memory_format, monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda *_: tuning.Config(*config))
    case = Case(
        (4, 4 if memory_format == FORMATS[0] else 70, 5, 9), 2, torch.float32, memory_format, True, True, DEVICE
    )
    check_phases(triton, case)
    with backend.use_backend("triton"):
        case.check(case.run(), "triton")


@results
@pytest.mark.parametrize("memory_format", FORMATS)
def test_64_bit_offsets(memory_format, monkeypatch):
    monkeypatch.setattr(tiles, "INDEX64_FROM", 0)
    for both in (False, True):
        case = Case((3, 5, 7, 5), 1, torch.float32, memory_format, True, True, DEVICE, both_adaptive=both)
        check_phases(triton, case)
        with backend.use_backend("triton"):
            case.check(case.run(), "triton")


@results
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_writes_all_of_its_results_and_nothing_else(dtype, memory_format, monkeypatch):
    guards = []

    def guarded(t):
        poison, fence = (255, 77) if t.dtype == torch.uint8 else (torch.nan, 77.0)
        buffer = torch.full((t.numel() + 64,), fence, dtype=t.dtype, device=t.device)
        inner = buffer[32 : 32 + t.numel()]
        inner.fill_(poison)
        guards.append((buffer, inner))
        return inner.as_strided(t.shape, t.stride(), inner.storage_offset())

    def guard(module, name, each):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: each(function(*a)))

    def several(tensors):
        return [guarded(t) for t in tensors]

    guard(layout, "forward_results", several)
    guard(layout, "backward_results", several)
    guard(twin_bn, "_empty_partial", guarded)
    for split, both in ((0, False), (1, False), (3, False), (1, True)):
        case = Case((3, 9, 3, 3), split, dtype, memory_format, True, True, DEVICE, both_adaptive=both)
        with backend.use_backend("triton"):
            case.check(case.run(), "triton")
    guard(layout, "empty_stats", guarded)  # also part of forward_results
    for split in (0, 3):
        check_phases(triton, Case((3, 9, 3, 3), split, dtype, memory_format, True, True, DEVICE))
    assert guards
    for buffer, inner in guards:
        assert (buffer[:32] == 77).all() and (buffer[32 + inner.numel() :] == 77).all()


@results
@pytest.mark.parametrize("split", [0, 2, 4])
def test_only_wanted_gradients(split):
    case = Case((4, 5, 3, 3), split, torch.float32, torch.channels_last, True, True, DEVICE)
    wings = Wing(*case.frozen), Wing(*case.adaptive)
    y, bits, stats = triton.forward(case.x, case.residual, split, *wings, 0.1, EPS, True, True)
    assert (split < 4) or (stats == 0).all()
    arguments = (case.dy, case.x, bits, split, *wings, stats, EPS)
    every = triton.backward(*arguments, [True] * 6)
    for i in range(6):
        wanted = [i == j for j in range(6)]
        got = triton.backward(*arguments, wanted)
        assert torch.equal(got[i], every[i]) and [t.numel() > 0 for t in got] == wanted
    assert all(t.numel() == 0 for t in triton.backward(*arguments, [False] * 6))
    if split == 0:
        assert all((t == 0).all() for t in every[2:4])
    if split == 4:
        assert all((t == 0).all() for t in every[4:])
    # What nobody asks for is not read: these would turn everything into NaN.
    nan = torch.full_like(case.x, torch.nan)
    (got,) = [t for t in triton.backward(case.dy, nan, *arguments[2:], [False, True, *[False] * 4]) if t.numel()]
    assert torch.equal(got, every[1])


@results
def test_without_weights_and_running_statistics():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, False, False, DEVICE)
    x, frozen = case.x.clone().requires_grad_(), Wing(*case.frozen[:2])
    with backend.use_backend("triton"):
        y = ops.twin_batch_norm(x, 2, frozen, Wing(), MOMENTUM, EPS)
        (dx,) = torch.autograd.grad(y, x, case.dy)
    want = reference.twin_batch_norm(x, 2, frozen, Wing(), MOMENTUM, EPS)
    (want_dx,) = torch.autograd.grad(want, x, case.dy)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-5)


@results
@pytest.mark.parametrize("memory_format", FORMATS)
def test_constant_channel_with_a_large_mean(memory_format):
    x = torch.full((4, 3, 13, 17), 300.0, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=memory_format)
    x[:, 1] = -7.3
    one = torch.ones(3, device=DEVICE)
    adaptive = Wing(one * 0, one.clone(), one, one * 0.5)
    with backend.use_backend("triton"):
        y = ops.twin_batch_norm(x, 0, Wing(), adaptive, 1.0, EPS)
    assert (y.double() - 0.5).abs().max() <= 0.008  # as in tests/ops/test_twin_bn.py
    torch.testing.assert_close(adaptive.running_mean, x[0, :, 0, 0].float())
    assert adaptive.running_var.abs().max() <= 1e-4  # of 300^2


@results
@pytest.mark.parametrize("memory_format", FORMATS)
def test_variance_about_an_outlier(memory_format):
    # The first value is far from the others: squares about it alone would cancel.
    x = torch.randn(6, 2, 24, 24, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    x[0, :, 0, 0] = 1e4
    want = phases.moments(x.double(), 0)
    got = triton.moments(x.to(DEVICE), 0).cpu().double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@results
def test_nan_stays_in_its_channel():
    case = Case((4, 5, 3, 3), 2, torch.float32, torch.channels_last, False, True, DEVICE)
    case.x[3, 2, 1, 1] = torch.nan
    case.x[0, 4, 1, 1] = torch.nan
    with backend.use_backend("triton"):
        y = case.run()[0]
    assert y[2:, 2].isnan().all() and y[0, 4, 1, 1].isnan()
    assert y.isnan().sum() == 2 * 9 + 1


@results
@pytest.mark.parametrize("memory_format", FORMATS)
def test_deterministic(memory_format):
    for both in (False, True):
        case = Case((4, 5, 9, 9), 2, torch.bfloat16, memory_format, True, True, DEVICE, both_adaptive=both)
        with backend.use_backend("triton"):
            first, second = case.run(), case.run()
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@results
def test_autograd_sees_the_running_statistics_change():
    case = Case((4, 3, 5, 5), 2, torch.float32, torch.channels_last, False, False, DEVICE)
    leaf = torch.ones(3, requires_grad=True, device=DEVICE)
    product = leaf * case.adaptive[0]  # saves it
    with backend.use_backend("triton"):
        ops.twin_batch_norm(case.x, 2, case.frozen, case.adaptive, MOMENTUM, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# [N, C, H, W] of ResNet-50 at 224 pixels and of a ResNet-18 at 32
LAYERS = [(128, c, n, n) for c, n in [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28)]]
LAYERS += [(128, c, n, n) for c, n in [(256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)]]
LAYERS += [(256, c, n, n) for c, n in [(64, 32), (128, 16), (256, 8), (512, 4)]]
LOADED = {"moments_kernel": 1, "apply_kernel": 1, "sums_kernel": 2, "apply_backward_kernel": 2}  # tensors


@pytest.fixture
def launched(monkeypatch):
    """Calls the op on a device of 132 multiprocessors; kernel -> (grid, arguments by name)."""
    calls = {}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **arguments: calls.update({self.name: (grid, arguments)})

    for name in LOADED:
        monkeypatch.setattr(twin_bn, name, Kernel(name))
    monkeypatch.setattr(tuning, "processors", lambda _: 132)
    monkeypatch.setattr(tuning, "choose", lambda phase, *_: tuning.CANDIDATES[phase][0])

    def call(shape, split, channels_last):
        geometry = twin_bn.Geometry.of(shape, split, channels_last, "bfloat16")
        x, vector = torch.empty(shape, dtype=torch.bfloat16, device="meta"), torch.empty(shape[1], device="meta")
        wing = (vector,) * 4
        twin_bn.forward(x, None, geometry, wing, wing, x, None, vector, 0.1, EPS, False)
        twin_bn.backward(x, x, None, geometry, wing, wing, vector, x, None, wing, EPS)
        return calls

    return call


@host
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_programs_fill_the_device(shape, launched):
    for name, (grid, arguments) in launched(shape, shape[0] // 2, True).items():
        programs, warps, block = grid[0] * grid[1], arguments["num_warps"], arguments["BLOCK_U"]
        held = 16 // warps  # by a multiprocessor, whose registers are enough for 16 warps of 128
        assert programs <= 132 * held, name  # one more would start when the others end
        ahead = min((twin_bn.STAGES.value - 1) * block, arguments["chunk"]) * arguments["BLOCK_V"] * 2 * LOADED[name]
        everything = arguments["chunk"] <= 2 * block
        assert programs * ahead / 132 >= 30 * 1024 or (everything and programs >= 0.75 * 132), name


@host
@pytest.mark.parametrize("shape, channels_last", [((128, 512, 2, 2), True), ((128, 64, 56, 56), False)], ids=str)
def test_small_problems_and_contiguous_memory_get_small_programs(shape, channels_last, launched):
    for grid, arguments in launched(shape, shape[0] // 2, channels_last).values():
        assert arguments["num_warps"] == 4 and arguments["BLOCK_U"] * arguments["BLOCK_V"] == 2048
        assert 64 <= grid[0] * grid[1] <= 4 * 132


@host
@compiles_ahead
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_loops_load_ahead(dtype):
    for launch in aot.launches(aot.Variant(dtype, True, "aligned", True, True)):
        compiled, block = aot.compile_launch(launch, 90), launch.constants["BLOCK_U"] * launch.constants["BLOCK_V"]
        tensors = 1 if launch.kernel == "moments_kernel" else 2  # with a residual
        assert "cp.async" in compiled["ptx"]
        assert compiled["shared"] >= (twin_bn.STAGES.value - 1) * block * getattr(torch, dtype).itemsize * tensors
        assert compiled["shared"] <= 99 * 1024  # what small devices have
        assert compiled["registers"] * launch.options["num_warps"] <= 128 * 16


@host
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_few_partial_results(shape, launched):
    calls = launched(shape, shape[0] // 2, True)
    slabs = calls["apply_kernel"][1]["slabs"]  # of the moments
    channel_tiles, programs = calls["apply_kernel"][0]
    assert slabs <= 132
    assert slabs <= 2 * calls["apply_kernel"][1]["BLOCK_S"]  # turns of the merge
    # Half of the programs merge all of the slabs: two rows of float32.
    read = channel_tiles * programs / 2 * slabs * 2 * 4 * calls["apply_kernel"][1]["BLOCK_C"]
    assert read < 5e6


@host
@pytest.mark.parametrize("split", [0, 1, 3, 40, 64, 65, 127, 128])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 64, 200, 256, 2048])
def test_slabs_cover_every_unit_once(channels, channels_last, split, monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda _: 132)
    for pixels in (1, 7, 14, 56):
        geometry = twin_bn.Geometry.of((128, channels, pixels, pixels), split, channels_last, "bfloat16")
        halves = geometry.first, geometry.units - geometry.first
        for config in {config for candidates in tuning.CANDIDATES.values() for config in candidates}:
            sizes, slabs = geometry.divide(config, halves, torch.device("cuda"))
            assert slabs.chunk >= sizes["BLOCK_U"]
            for units, count in zip(halves, (slabs.frozen, slabs.adaptive), strict=True):
                assert count * slabs.chunk >= units > (count - 1) * slabs.chunk
            warps = sizes["num_warps"]
            most = config.programs * config.warps // warps * 132
            tiles_alone = slabs.channel_tiles * sum(units > 0 for units in halves)
            assert slabs.channel_tiles * (slabs.frozen + slabs.adaptive) <= max(most, tiles_alone)


@results
@pytest.mark.parametrize("both", [False, True])
def test_measuring_leaves_the_running_statistics_alone(both, monkeypatch):
    case = Case((4, 5, 3, 3), 2, torch.float32, torch.channels_last, True, True, DEVICE, both_adaptive=both)
    with backend.use_backend("triton"):
        want = case.run()

    def choose(phase, geometry, x, launch, tensors):
        for values in (256, 64, 128):
            launch(tuning.Config(values, 8, 4, 6), *tensors)
        return tuning.INTERPRETER

    monkeypatch.setattr(tuning, "default", lambda *_: tuning.INTERPRETER)
    monkeypatch.setattr(tuning, "choose", choose)
    with backend.use_backend("triton"):
        got = case.run()
    case.check(got, "triton")
    if DEVICE == "cpu":  # where the same configuration was used before
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
