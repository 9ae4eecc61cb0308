"""The CUDA kernels without a GPU: their source compiled for an emulated device that runs on host memory."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from tests.cuda_emulator.build import CXX, build
from tests.ops.cases import DTYPES, EPS, FORMATS, Case, check_phases, random_cases, splits
from twins_fast import ops
from twins_fast.ops import backend, native

pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="no g++")
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 32, 8, 7), (3, 520, 5, 5)]


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """CPU tensors go to the CUDA kernels, with a workspace full of NaN."""
    path = build(tmp_path_factory.mktemp("emulated"))
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def on_emulator(name):
        def launch(*arguments):
            channels, channels_last = arguments[1], arguments[4]
            workspace = torch.full((module.twin_bn_workspace_cuda(channels, channels_last),), torch.nan)
            return getattr(module, name)(*arguments[:-2], workspace.data_ptr(), 0)

        return launch

    launches = {
        "twin_bn_forward_cpu": on_emulator("twin_bn_forward_cuda"),
        "twin_bn_backward_cpu": on_emulator("twin_bn_backward_cuda"),
    }
    with pytest.MonkeyPatch.context() as patch, backend.use_backend("cpp"):
        patch.setenv("CUDA_EMULATOR_UNEVEN", "1")  # kernels differ in how many blocks a multiprocessor holds
        patch.setattr(native, "_C", SimpleNamespace(has_cuda=False, pixels_cuda=module.pixels_cuda, **launches))
        yield


@pytest.fixture(params=[1, 0], ids=["one launch", "two launches"])
def cooperative(request, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_COOPERATIVE", str(request.param))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, memory_format, dtype, cooperative):
    for split in splits(shape):
        case = Case(shape, split, dtype, memory_format, True, True)
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
    for shape in (3, 72, 5, 7), (2, 600, 3, 3):
        case = Case(shape, 1, torch.bfloat16, memory_format, True, True)
        case.check(case.run(), "cuda")


def test_a_device_that_holds_fewer_blocks_than_it_said(monkeypatch):
    case = Case((8, 64, 9, 9), 4, torch.bfloat16, torch.channels_last, True, True)
    case.run()
    monkeypatch.setenv("CUDA_EMULATOR_BLOCKS_PER_SM", "1")
    monkeypatch.setenv("CUDA_EMULATOR_UNEVEN", "0")
    case.check(case.run(), "cuda")


def test_the_order_of_threads_changes_nothing(monkeypatch):
    case = Case((6, 40, 9, 9), 3, torch.float32, torch.channels_last, True, True)
    want = case.run()
    for seed in range(1, 6):
        monkeypatch.setenv("CUDA_EMULATOR_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(case.run(), want, strict=True))


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
        native._launch("forward", x, 0, (None,) * 13, 0.1, EPS, False, 0)


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
    values = torch.zeros(8, 4).data_ptr()
    codes = [1] * steps
    return native._C.pixels_cuda(1, channels, *size, *out_size, 0, 0, codes, values, "float32", *pointers, 0, 0, 0)


def test_pixels_that_have_no_kernel_are_an_error():
    assert pixels() == pixels(4, 8) == ""
    assert "invalid argument" in pixels(channels=5)
    assert "invalid argument" in pixels(out_size=(4, 2))  # without a table
    assert "invalid argument" in pixels(size=(2**15, 2**15), out_size=(2**15, 2**15), image=torch.rand(1, 3, 1, 1))
    with pytest.raises(ValueError, match="8 steps"):
        pixels(steps=9)
