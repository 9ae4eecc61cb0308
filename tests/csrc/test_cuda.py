"""The CUDA kernels without a GPU: their source compiled for an emulated device that runs on host memory."""

import ctypes
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from tests.cuda_emulator.build import CXX, build
from tests.modules import load
from tests.ops.cases import DTYPES, EPS, FORMATS, Case, check_phases, random_cases, splits
from twins_fast import ops
from twins_fast.ops import backend, layout, native
from twins_fast.ops.wing import Wing

pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="no g++")
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 32, 8, 7), (3, 520, 5, 5)]
L2 = 20_000  # bytes of the emulated second-level cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module", autouse=True)
def emulated(path):
    """CPU tensors go to the CUDA kernels, with a workspace full of NaN."""
    module = load("_C", path)

    def on_emulator(name):
        def launch(*arguments):
            channels, channels_last, workspace = arguments[1], arguments[4], arguments[-3]
            ctypes.memset(workspace, 0xFF, 4 * module.twin_bn_workspace_cuda(channels, channels_last))
            return getattr(module, name)(*arguments)

        return launch

    launches = {name: on_emulator(name) for name in ("twin_bn_forward_cuda", "twin_bn_backward_cuda")}
    kernels = {name: getattr(module, name) for name in ("twin_bn_workspace_cuda", "pixels_cuda")}
    with pytest.MonkeyPatch.context() as patch, backend.use_backend("cpp"):
        patch.setenv("CUDA_EMULATOR_UNEVEN", "1")  # kernels differ in how many blocks a multiprocessor holds
        patch.setenv("CUDA_EMULATOR_L2", str(L2))
        patch.setattr(native, "_C", SimpleNamespace(has_cuda=False, **kernels, **launches))
        patch.setattr(native, "_launch_cpu", native._launch_cuda)
        patch.setattr(torch.cuda, "device", nullcontext)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield


@pytest.fixture
def emulator(path):
    return ctypes.CDLL(str(path))


@pytest.fixture(params=[1, 0], ids=["one launch", "three launches"])
def cooperative(request, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_COOPERATIVE", str(request.param))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, memory_format, dtype, cooperative):
    for both in (False, True):
        for split in splits(shape, both):
            case = Case(shape, split, dtype, memory_format, True, True, both_adaptive=both)
            case.check(case.run(), "cuda")


@settings(max_examples=40, deadline=None)
@given(case=random_cases(most_channels=300, most_pixels=7))
def test_any_call(case):
    case.check(case.run(), "cuda")


@settings(max_examples=40, deadline=None)
@given(case=random_cases(most_channels=300, most_pixels=7))
def test_phases_of_any_call(case):
    check_phases(native, case)


# Few blocks visit many tiles each; many blocks leave some without work.
@pytest.mark.parametrize("multiprocessors", [1, 20])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_any_number_of_blocks(multiprocessors, memory_format, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_SMS", str(multiprocessors))
    for shape, both in ((3, 72, 5, 7), False), ((2, 600, 3, 3), False), ((3, 72, 5, 7), True):
        case = Case(shape, 1, torch.bfloat16, memory_format, True, True, both_adaptive=both)
        case.check(case.run(), "cuda")


def test_a_device_that_holds_fewer_blocks_than_it_said(monkeypatch):
    case = Case((8, 64, 9, 9), 4, torch.bfloat16, torch.channels_last, True, True)
    case.run()
    monkeypatch.setenv("CUDA_EMULATOR_BLOCKS_PER_SM", "1")
    monkeypatch.setenv("CUDA_EMULATOR_UNEVEN", "0")
    case.check(case.run(), "cuda")


@pytest.mark.parametrize("both", [False, True])
def test_the_order_of_threads_changes_nothing(both, monkeypatch):
    case = Case((6, 40, 9, 9), 3, torch.float32, torch.channels_last, True, True, both_adaptive=both)
    want = case.run()
    for seed in range(1, 6):
        monkeypatch.setenv("CUDA_EMULATOR_SEED", str(seed))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(case.run(), want, strict=True))


class Watched:
    """Counts how often a launch loads and stores each byte of some tensors, as usual or to be evicted first."""

    def __init__(self, emulator, **tensors):
        self.emulator, self.tensors = emulator, tensors
        self.counts = {
            name: torch.zeros(4, t.numel() * t.element_size(), dtype=torch.uint8) for name, t in tensors.items()
        }

    def __enter__(self):
        for name, tensor in self.tensors.items():
            size, counts = self.counts[name].shape[1], self.counts[name].data_ptr()
            self.emulator.cuda_emulator_watch(ctypes.c_void_p(tensor.data_ptr()), size, ctypes.c_void_p(counts))
        return self

    def __exit__(self, *_):
        self.emulator.cuda_emulator_watch(None, 0, None)

    def of(self, name):
        """loads as usual, loads to be evicted first, stores as usual, stores to be evicted first"""
        return self.counts[name].unbind()


# The cache holds a small part of the adaptive half, or all of it; rows are whole groups, or not.
@pytest.mark.parametrize(
    "shape, dtype",
    [((4, 24, 32, 32), torch.bfloat16), ((4, 20, 17, 17), torch.float32), ((4, 8, 8, 8), torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_fits_the_cache_is_kept_for_the_second_read(direction, memory_format, shape, dtype, emulator, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_SMS", "24")  # no block has more than one tile
    case = Case(shape, 2, dtype, memory_format, True, True)
    x, residual, dy, frozen, adaptive = case.x, case.residual, case.dy, Wing(*case.frozen), Wing(*case.adaptive)
    y, bits, stats = layout.forward_results(x, True)
    native._forward(x, residual, 2, frozen, adaptive, y, bits, stats, 0.1, EPS, True, native._ALL)
    results = layout.backward_results(x, [True] * 6)
    if direction == "forward":
        twice, once, outputs = {"x": x}, {"residual": residual}, {"y": y}
    else:
        twice, once, outputs = {"dy": dy, "x": x}, {}, {"dx": results[0], "dresidual": results[1]}
    with Watched(emulator, **twice, **once, **outputs) as watched:
        if direction == "forward":
            native._forward(x, residual, 2, frozen, adaptive, y, bits, stats, 0.1, EPS, True, native._ALL)
        else:
            native._backward(dy, x, bits, 2, frozen, adaptive, stats, results, None, EPS, native._ALL)

    half = x.numel() * x.element_size() // 2  # bytes
    for name in twice:
        usual, first, *stores = watched.of(name)
        assert not usual[:half].any() and (first[:half] == 1).all() and not any(store.any() for store in stores)
        usual, first = usual[half:], first[half:]
        assert usual.max() <= 1 and (usual + first == 2).all()  # the second read lets go of what was kept
    kept = usual == 1
    if len(twice) * half <= 0.4 * L2:
        assert kept.all()
    else:
        assert 0.2 * L2 < len(twice) * kept.sum() <= 0.4 * L2
    for name in once:
        usual, first, *_ = watched.of(name)
        assert not usual.any() and (first == 1).all()
    for name in outputs:  # past the cache until what is kept has been read again
        *loads, usual, first = watched.of(name)
        assert not any(load.any() for load in loads) and (usual + first == 1).all() and not usual[:half].any()
        assert (usual[half:] == 1).equal(~kept)


def test_partial_sums_are_read_by_one_block(emulator, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_SMS", "12")
    case = Case((8, 72, 12, 12), 4, torch.bfloat16, torch.channels_last, True, True)
    x, frozen, adaptive = case.x, Wing(*case.frozen), Wing(*case.adaptive)
    results = layout.forward_results(x, False)
    workspace = torch.zeros(native._C.twin_bn_workspace_cuda(72, True))
    with monkeypatch.context() as patch, Watched(emulator, workspace=workspace) as watched:
        patch.setattr(torch.Tensor, "new_empty", lambda *_, **__: workspace)
        native._forward(x, None, 4, frozen, adaptive, *results, 0.1, EPS, False, native._ALL)
    loads, _, stores, _ = watched.of("workspace")
    assert loads.max() == 1 and loads.equal(stores) and loads.sum() >= 3 * 4 * 72 * 2  # three vectors of several slabs


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_leave_the_device_to_each_other(processes, both, emulator, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: processes)
    case = Case((4, 16, 5, 5), 2, torch.bfloat16, torch.channels_last, True, True, both_adaptive=both)
    before = [emulator.cuda_emulator_launches(cooperative) for cooperative in (False, True)]
    case.check(case.run(), "cuda")
    after = [emulator.cuda_emulator_launches(cooperative) for cooperative in (False, True)]
    assert [b - a for a, b in zip(before, after, strict=True)] == ([0, 2] if processes == 1 else [6, 0])


def test_misaligned_views_take_the_narrow_path():
    case = Case((4, 16, 5, 5), 2, torch.bfloat16, torch.channels_last, False, False)
    storage = torch.empty(case.x.numel() + 1, dtype=torch.bfloat16)
    x = storage[1:].as_strided(case.x.shape, case.x.stride(), 1).copy_(case.x)
    arguments = (2, case.frozen, [t.clone() for t in case.adaptive], 0.1, EPS)
    assert x.data_ptr() % 16 == 2
    assert torch.equal(ops.twin_batch_norm(x, *arguments), case.run()[0])


def test_more_values_than_can_be_counted_is_an_error():
    x = torch.empty(1).expand(2**17, 1, 2**7, 2**7)
    with pytest.raises(RuntimeError, match="invalid argument"):
        native._launch("forward", x, 0, (None,) * 13, 0.1, EPS, False, False, 0)


@pytest.mark.parametrize("seed", ["0", "1"])
def test_pixels(seed, monkeypatch):
    pytest.importorskip("triton")  # whose kernels have the same caller
    from tests.kernels.test_attack import PIXELS, check_pixels

    monkeypatch.setenv("CUDA_EMULATOR_SEED", seed)
    for case in PIXELS:
        check_pixels(*case, native=True)


def pixels(channels=3, steps=0, size=(2, 2), out_size=(2, 2), image=None):
    image = torch.rand(1, channels, *size) if image is None else image
    out = torch.empty(image.shape)
    pointers = (image.data_ptr(), 0, 0, 0, 0, out.data_ptr())
    values, codes = torch.zeros(8, 4), [1] * steps
    sizes = (1, channels, *size, *out_size, 0, 0)
    return native._C.pixels_cuda(*sizes, codes, values.data_ptr(), "float32", *pointers, 0, 0, 0)


def test_pixels_that_have_no_kernel_are_an_error():
    assert pixels() == pixels(4, 8) == ""
    assert "invalid argument" in pixels(channels=5)
    assert "invalid argument" in pixels(out_size=(4, 2))  # without a table
    assert "invalid argument" in pixels(size=(2**15, 2**15), out_size=(2**15, 2**15), image=torch.rand(1, 3, 1, 1))
    with pytest.raises(ValueError, match="8 steps"):
        pixels(steps=9)
