"""The steps of an attack's plan in Triton against those in PyTorch, and CUDA graphs."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from tests.kernels.interpreter import DEVICE, host, results, run_in_the_interpreter
from twins_fast.attacks import PGD
from twins_fast.attacks.engine import cache, windows
from twins_fast.attacks.engine.convolution import Convolution
from twins_fast.attacks.engine.executors.cuda import CudaConvolution, CudaExecutor
from twins_fast.attacks.engine.executors.torch import Input, State, TorchExecutor
from twins_fast.attacks.engine.plan import Stage
from twins_fast.kernels import aot, tiles
from twins_fast.kernels import attack as kernels
from twins_fast.models import CifarResNet
from twins_fast.ops import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 3, 3), (3, 17, 4, 2), (2, 64, 3, 2)]
FENCE = 64
CONFIGS = [kernels.INTERPRETER_CONVOLUTION] if DEVICE == "cpu" else kernels.CONVOLUTION_CONFIGS[:4]


@host
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, pytestconfig)


@pytest.fixture(autouse=True)
def exact_convolutions(exact):
    pass


class Memory:
    """Tensors between fences, results full of NaN."""

    def __init__(self, dtype, seed=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)
        self.fenced = []

    def guarded(self, count, dtype):
        fence, poison = (77, 255) if dtype == torch.uint8 else (77.0, torch.nan)
        buffer = torch.full((count + 2 * FENCE,), fence, dtype=dtype, device=DEVICE)
        inner = buffer[FENCE:-FENCE].fill_(poison)
        self.fenced.append(buffer)
        return inner

    def empty(self, shape):
        images, channels, height, width = shape
        flat = self.guarded(images * channels * height * width, self.dtype)
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)

    def values(self, shape, special=()):
        x = self.empty(shape)
        x.copy_(torch.randn(shape, generator=self.generator))
        flat = x.permute(0, 2, 3, 1).reshape(-1)
        for place, value in enumerate(special[: flat.numel()]):
            flat[place * 7 % flat.numel()] = value
        x.permute(0, 2, 3, 1).copy_(flat.view(x.permute(0, 2, 3, 1).shape))
        return x

    def bits(self, shape):
        """A random mask as bytes and as bits."""
        images, channels, height, width = shape
        mask = torch.rand(images * height * width, channels, generator=self.generator) < 0.5
        return mask.to(torch.uint8).flatten().to(DEVICE), packed(mask).to(DEVICE)

    def empty_bits(self, shape):
        images, channels, height, width = shape
        return self.guarded(images * height * width * ((channels + 7) // 8), torch.uint8)

    def check_fences(self):
        for buffer in self.fenced:
            assert (buffer[:FENCE] == 77).all() and (buffer[-FENCE:] == 77).all()


def packed(mask):
    """Bits [pixels, ceil(C / 8)] of a mask [pixels, C]."""
    mask = nn.functional.pad(mask.int(), (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (mask << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8).flatten()


def both(dtype):
    return TorchExecutor(dtype, torch.device(DEVICE)), CudaExecutor(dtype, torch.device(DEVICE))


def close(got, want, dtype):
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def stage_of(**options):
    return State(Stage("", "", [], [], options=options))


SPECIAL = (torch.nan, 0.0, -0.0, torch.inf, -torch.inf)


def with_dtypes(*cases):
    """Each case with one dtype in turn, since the interpreter is slow."""
    return [(*case, DTYPES[i % 3]) for i, case in enumerate(cases)]


@results
@pytest.mark.parametrize("shape, dtype", with_dtypes(*((shape,) for shape in SHAPES)), ids=str)
def test_finish_and_affine(shape, dtype):
    memory = Memory(dtype)
    reference, ours = both(dtype)
    x, other, g = memory.values(shape, SPECIAL), memory.values(shape), memory.values(shape)
    state = stage_of()
    state.scale, state.shift = (torch.randn(shape[1], generator=memory.generator).to(DEVICE) for _ in range(2))
    bytes_, bits = memory.bits(shape)
    for summand in (None, other):
        # A sum with ReLU, then a batch norm with ReLU.
        for step in ("pointwise", "affine"):
            want, want_mask = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.uint8, device=DEVICE)
            got, got_bits = memory.empty(shape), memory.empty_bits(shape)
            getattr(reference, step)(state, {"x": x, "other": summand, "mask": want_mask, "y": want})()
            getattr(ours, step)(state, {"x": x, "other": summand, "mask": got_bits, "y": got})()
            close(got, want, dtype)
            if step == "pointwise":
                assert torch.equal(got, want) or got.isnan().any()
                assert torch.equal(got_bits, packed(want_mask.view(-1, shape[1])))
        for step, mask in (("finish", True), ("affine_backward", True), ("affine_backward", False)):
            want, got = torch.empty_like(x), memory.empty(shape)
            role, result = ("x", "y") if step == "finish" else ("g", "dx")
            getattr(reference, step)(
                state, {role: g, "other": summand, "mask": bytes_ if mask else None, result: want}
            )()
            getattr(ours, step)(state, {role: g, "other": summand, "mask": bits if mask else None, result: got})()
            close(got, want, dtype)
    in_place = g.clone(memory_format=torch.preserve_format)
    ours.finish(state, {"x": in_place, "other": other, "mask": bits, "y": in_place})()
    reference.finish(state, {"x": g, "other": other, "mask": bytes_, "y": want})()
    assert torch.equal(in_place, want)
    memory.check_fences()


@results
def test_affine_of_a_gated_gradient():
    memory, shape = Memory(torch.float32), (2, 11, 3, 5)
    g, other, (bytes_, bits) = memory.values(shape), memory.values(shape), memory.bits(shape)
    scale, got = torch.randn(11, device=DEVICE), memory.empty(shape)
    kernels.pointwise(g, got, (30, 11), gate=bits, scale=scale, other=other)
    gate = bytes_.view(2, 3, 5, 11).permute(0, 3, 1, 2)
    close(got, g * gate * scale.view(-1, 1, 1) + other, torch.float32)


WINDOWS = [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1)), ((2, 2), (2, 2), (0, 0)), ((1, 2), (3, 1), (0, 0))]


@results
@pytest.mark.parametrize("kernel, stride, padding, dtype", with_dtypes(*WINDOWS), ids=str)
def test_max_pool(kernel, stride, padding, dtype):
    memory, shape = Memory(dtype), (2, 9, 7, 6)
    reference, ours = both(dtype)
    x = memory.values(shape, (*SPECIAL, torch.nan, torch.nan))
    x[:, 3] = x[:, 3].round()  # equal maxima
    if DEVICE == "cpu":
        x[0, 4] = -torch.inf  # on a GPU PyTorch gives the image's first pixel then
    state = stage_of(kernel=kernel, stride=stride, padding=padding, ceil=False)
    small = (2, 9, *(((n + 2 * p - k) // s + 1) for n, k, s, p in zip(shape[2:], kernel, stride, padding, strict=True)))
    want = torch.empty_like(memory.empty(small))
    want_index = torch.empty(want.numel() * reference.argmax_bytes, dtype=torch.uint8, device=DEVICE)
    got, index = memory.empty(small), memory.guarded(want.numel(), torch.uint8)
    reference.max_pool(state, {"x": x, "y": want, "argmax": want_index})()
    ours.max_pool(state, {"x": x, "y": got, "argmax": index})()
    close(got, want, dtype)
    want_place = want_index.view(torch.int64).view(2, *small[2:], 9)  # in the image; ours is in the window
    rows, columns = (torch.arange(n, device=DEVICE) * s - p for n, s, p in zip(small[2:], stride, padding, strict=True))
    place = index.view(want_place.shape).long()
    row, column = rows[:, None, None] + place // kernel[1], columns[:, None] + place % kernel[1]
    assert torch.equal(row * shape[3] + column, want_place)

    g, other, (bytes_, bits) = memory.values(small), memory.values(shape), memory.bits(shape)
    for summand, mask in ((None, False), (other, True)):
        want, got = torch.empty_like(x), memory.empty(shape)
        tensors = {"g": g, "other": summand}
        reference.max_pool_backward(
            state, {**tensors, "argmax": want_index, "mask": bytes_ if mask else None, "dx": want}
        )()
        ours.max_pool_backward(state, {**tensors, "argmax": index, "mask": bits if mask else None, "dx": got})()
        torch.testing.assert_close(got, want, rtol=4 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    memory.check_fences()


@results
@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter runs")
@pytest.mark.parametrize("kernel, stride, looks", [(3, 2, 4), (7, 7, 1), (2, 3, 1), (3, 1, 9)])
def test_a_gradient_looks_only_into_windows_that_may_hold_the_pixel(kernel, stride, looks, monkeypatch):
    memory, loads, load = Memory(torch.float32), [], tiles.load_float32
    monkeypatch.setattr(tiles, "load_float32", lambda *arguments: loads.append(1) or load(*arguments))
    size = kernel + stride  # of two means
    mean = windows.pooled(size, 2, kernel, stride, 0, True)
    state, g = stage_of(rows=mean, columns=mean), memory.values((1, 8, 2, 2))
    tensors = {"g": g, "other": None, "mask": None, "dx": memory.empty((1, 8, size, size))}
    both(torch.float32)[1].avg_pool_backward(state, tensors)()
    programs = -(-size * size // 32)
    assert len(loads) == looks * programs


@results
@pytest.mark.parametrize(
    "kernel, stride, dtype", with_dtypes(((7, 6), (7, 6)), ((2, 2), (2, 2)), ((3, 2), (2, 1))), ids=str
)
def test_avg_pool(kernel, stride, dtype):
    memory, shape = Memory(dtype), (2, 13, 7, 6)
    reference, ours = both(dtype)
    small = (2, 13, *(((n - k) // s + 1) for n, k, s in zip(shape[2:], kernel, stride, strict=True)))
    sizes = zip(shape[2:], small[2:], kernel, stride, strict=True)
    rows, columns = (windows.pooled(*numbers, 0, True) for numbers in sizes)
    x, state = memory.values(shape, SPECIAL[:1]), stage_of(rows=rows, columns=columns)
    want, got = torch.empty_like(memory.empty(small)), memory.empty(small)
    reference.avg_pool(state, {"x": x, "y": want})()
    ours.avg_pool(state, {"x": x, "y": got})()
    close(got, want, dtype)
    g, other, (bytes_, bits) = memory.values(small), memory.values(shape), memory.bits(shape)
    for summand, mask in ((None, False), (other, True)):
        want, got = torch.empty_like(x), memory.empty(shape)
        reference.avg_pool_backward(state, {"g": g, "other": summand, "mask": bytes_ if mask else None, "dx": want})()
        ours.avg_pool_backward(state, {"g": g, "other": summand, "mask": bits if mask else None, "dx": got})()
        close(got, want, dtype)
    memory.check_fences()


def convolution_of(inputs, outputs, size, kernel=1, stride=1, padding=0, dilation=1, upsample=1):
    """Numbers are for both axes, pairs for one each."""
    kernel, stride, padding, dilation, upsample = (
        (n, n) if isinstance(n, int) else n for n in (kernel, stride, padding, dilation, upsample)
    )
    axes = zip(size, kernel, stride, padding, dilation, upsample, strict=True)
    out = tuple((n * f + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, f in axes)
    return Convolution(inputs, size, outputs, out, kernel, stride, padding, dilation, upsample=upsample)


GEOMETRIES = [
    convolution_of(8, 24, (3, 5)),
    convolution_of(64, 8, (5, 4), 1, 2),  # whose input gradient has pixels without taps
    convolution_of(136, 8, (3, 3), 1, 3),
    convolution_of(24, 16, (4, 5), 3, 1, 1),
    convolution_of(8, 64, (6, 5), 3, 2, 1),
    convolution_of(16, 8, (7, 8), 5, 3, 2),
    convolution_of(8, 8, (7, 6), (3, 2), (1, 2), (2, 1), (2, 3)),
    convolution_of(8, 8, (9, 5), 3, 2, 2, 2),  # strided and dilated: phases without taps
    convolution_of(3, 8, (8, 8), 7, 2, 3),  # an image: rows of pixels, blocks of 4x4
    convolution_of(3, 16, (6, 8), 3, 1, 1),
    convolution_of(3, 8, (5, 7), 7, 2, 3),  # which no block divides
    convolution_of(1, 8, (4, 8), (1, 3), (1, 2), (0, 2), (1, 2)),
    convolution_of(4, 8, (8, 8), 4, 4),
    convolution_of(3, 8, (4, 4), 7, 2, 3, upsample=7),
    convolution_of(2, 8, (3, 4), (3, 5), 1, (1, 2), (3, 1), (2, 3)),
    convolution_of(16, 8, (3, 3), 3, 3, 1, 1, 2),
    convolution_of(8, 16, (4, 3), (4, 3)),  # a single result
    convolution_of(3, 8, (5, 6), (5, 6)),
]


@results
@pytest.mark.parametrize("number", range(len(GEOMETRIES)))
def test_convolution(number):
    check_convolution(GEOMETRIES[number], DTYPES[1 + number % 2], CONFIGS[number % len(CONFIGS)])


@results
@pytest.mark.parametrize("width", [64, 128, 256])
def test_convolution_of_wide_tiles(width):
    config = kernels.CONVOLUTION_CONFIGS[3] if DEVICE == "cuda" else kernels.INTERPRETER_CONVOLUTION
    check_convolution(convolution_of(136, 200, (2, 3)), torch.bfloat16, config._replace(width=width))


def check_convolution(g, dtype, config):
    memory = Memory(dtype)
    ours = CudaExecutor(dtype, torch.device(DEVICE))
    reference = TorchExecutor(torch.float32, torch.device(DEVICE))
    # Weights whose sums are exact, which upsampling rounds to the dtype.
    weight = torch.randint(-4, 5, (g.out_channels, g.in_channels, *g.kernel), generator=memory.generator) / 8
    want_state, state = stage_of(), stage_of()
    want_state.convolution, state.convolution = reference.convolution(g), ours.convolution(g)
    for each in (want_state, state):
        each.shift = torch.linspace(-1, 1, g.out_channels, device=DEVICE)
        for sign in (-1, 1):  # the second time into the same memory
            each.convolution.fold(sign * weight.to(DEVICE), None)
    state.convolution.algorithm = lambda *_: config
    before, after = (2, g.in_channels, *g.in_size), (2, g.out_channels, *g.out_size)
    x, g_out, other, share = (memory.values(shape) for shape in (before, after, after, before))

    def check(step, tensors, result):
        want = torch.empty_like(tensors[result].float())
        floats = {
            role: t.float() if t is not None and t.dtype == dtype else t
            for role, t in tensors.items()
            if role != "mask"
        }
        mask = tensors["mask"]
        if step == "conv" and mask is not None:
            mask = torch.empty(want.numel(), dtype=torch.uint8, device=DEVICE)
        elif mask is not None:
            mask, tensors["mask"] = mask
        getattr(reference, step)(want_state, {**floats, "mask": mask, result: want})()
        got = tensors[result].fill_(torch.nan)
        getattr(ours, step)(state, tensors)()
        torch.testing.assert_close(got.float(), want, rtol=TOLERANCE[dtype], atol=1e-5)
        return got

    y, bits = memory.empty(after), memory.empty_bits(after)
    check("conv", {"x": x, "other": None, "mask": None, "y": y}, "y")
    got = check("conv", {"x": x, "other": other, "mask": bits, "y": y}, "y")
    assert torch.equal(bits, packed((got > 0).permute(0, 2, 3, 1).reshape(-1, g.out_channels)))
    dx, mask = memory.empty(before), memory.bits(before)
    check("conv_backward", {"g": g_out, "other": None, "mask": None, "dx": dx}, "dx")
    if not state.convolution.directions[True].product.block_row:
        check("conv_backward", {"g": g_out, "other": share, "mask": mask, "dx": dx}, "dx")
    memory.check_fences()


@host
def test_an_image_that_is_used_twice_is_left_to_the_library(monkeypatch):
    """Blocks of pixels have no place for another gradient or a mask."""
    calls = []
    monkeypatch.setattr(kernels, "convolution", lambda *_, **__: calls.append("ours"))
    ours, state = CudaExecutor(torch.bfloat16, torch.device("cpu")), stage_of()
    state.convolution = ours.convolution(GEOMETRIES[8])
    state.convolution.fold(torch.ones(8, 3, 7, 7), None)
    state.convolution.algorithm = lambda *_: CONFIGS[0]
    monkeypatch.setattr(state.convolution, "backward", lambda gradient: calls.append("library") or gradient)
    monkeypatch.setattr(ours, "_finish", lambda *_: None)
    tensors = {"g": torch.ones(1, 8, 4, 4), "mask": None, "dx": torch.ones(1, 3, 8, 8)}
    ours.conv_backward(state, {**tensors, "other": None})()
    ours.conv_backward(state, {**tensors, "other": tensors["dx"]})()
    assert calls == ["ours", "library"]


@host
def test_which_convolutions_the_kernel_takes():
    taken = CudaExecutor(torch.bfloat16, torch.device("cpu")).convolution(GEOMETRIES[0])
    assert None not in taken.directions
    assert CudaExecutor(torch.float32, torch.device("cpu")).convolution(GEOMETRIES[0]).directions == (None, None)
    for geometry in (convolution_of(24, 12, (3, 3)), convolution_of(12, 24, (3, 3)), convolution_of(5, 8, (3, 3))):
        assert CudaExecutor(torch.bfloat16, torch.device("cpu")).convolution(geometry).directions == (None, None)


@host
def test_candidates_fit_the_problem_and_the_device(monkeypatch):
    convolution = CudaExecutor(torch.bfloat16, torch.device("cpu")).convolution(convolution_of(32, 64, (4, 4), 3, 1, 1))
    convolution.fold(torch.ones(64, 32, 3, 3), None)
    counts = {}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        candidates = convolution.candidates(backward=False)
        assert candidates[0] is None and len(set(candidates)) == len(candidates)
        assert all(config.width == 64 and config.inner == 32 for config in candidates[1:])
        counts[capability] = len(candidates)
    assert counts[8, 0] < counts[9, 0] <= 1 + len(kernels.CONVOLUTION_CONFIGS)


@results
def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(tiles, "INDEX64_FROM", 0)
    test_finish_and_affine(SHAPES[1], torch.bfloat16)
    test_max_pool(*WINDOWS[2], torch.float32)
    test_avg_pool((3, 2), (2, 1), torch.float32)
    check_convolution(GEOMETRIES[4], torch.float16, CONFIGS[0])
    check_convolution(GEOMETRIES[8], torch.bfloat16, CONFIGS[0])


PROGRAMS = {
    "none": [],
    "normalise": [("sub", (0.485, 0.456, 0.406)), ("div", (0.229, 0.224, 0.225))],
    "all": [("clamp", 0.1, 0.8, 1), ("mul", 2.0), ("add", (0.1, -0.2, 0.3)), ("clamp", 0.3, 1.5, 0), ("div", -3.0)],
}


PIXELS = with_dtypes(*product(PROGRAMS, (None, (10, 21), (7, 5), (3, 11))))


@results
@pytest.mark.parametrize("program, resized, dtype", PIXELS, ids=str)
def test_pixels(program, resized, dtype):
    check_pixels(program, resized, dtype)
    if DEVICE == "cuda" and native._C is not None and native._C.has_cuda:
        check_pixels(program, resized, dtype, native=True)


def check_pixels(program, resized, dtype, native=False):
    """``native``: the CUDA kernel instead of Triton's."""
    memory, size = Memory(dtype), (5, 7)
    steps = [
        (kind, *(torch.tensor(a, device=DEVICE) if isinstance(a, tuple) else a for a in arguments))
        for kind, *arguments in PROGRAMS[program]
    ]
    shape = (3, *size)
    reference = Input(steps, shape, resized)
    ours = CudaExecutor(dtype, torch.device(DEVICE)).input(steps, shape, resized)
    ours.bind(native)
    clean = torch.rand(3, *shape, generator=memory.generator)
    x = (clean + 0.1 * torch.randn(clean.shape, generator=memory.generator)).clamp(0, 1)
    x[0, 0, 0] = 0.1  # at a bound
    clean, x = clean.to(DEVICE), x.to(DEVICE)
    network = (3, 3, *(resized or size))
    want, got = torch.empty_like(memory.empty(network)), memory.empty(network)
    reference.prepare(x, want)
    ours.prepare(x, got)
    same = (lambda a, b: torch.equal(a, b)) if DEVICE == "cpu" else torch.allclose  # on a GPU PyTorch divides otherwise
    assert same(got, want)
    g = memory.values(network, (torch.nan, 0.0, -0.0, *[torch.nan] * 6))
    if resized is None:
        assert torch.allclose(ours.gradient(x, g), reference.gradient(x, g), rtol=1e-6, equal_nan=True)
    else:
        torch.testing.assert_close(ours.gradient(x, g), reference.gradient(x, g), rtol=1e-5, atol=1e-5, equal_nan=True)
    for alpha in (0.03, 2 / 255):
        want_x, got_x = x.clone(), memory.guarded(x.numel(), torch.float32).view(x.shape).copy_(x)
        want_nan, nan = (torch.full((3,), 5, device=DEVICE) for _ in range(2))
        reference.sign_step(want_x, clean, g, alpha, 8 / 255, want_nan, want)
        ours.sign_step(got_x, clean, g, alpha, 8 / 255, nan, got.fill_(torch.nan))
        # On a GPU the sums over copies may differ in the last bit, and so their signs if they are nearly 0.
        assert same(got_x, want_x) and same(got, want)
        assert torch.equal(nan, want_nan) and nan.sum() > 15
    memory.check_fences()


@host
def test_the_cuda_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    current, launched = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Image:  # on the second of two GPUs, which this machine lacks
        is_cuda, device, dtype, shape = True, torch.device("cuda", 1), torch.float32, (2, 3, 4, 5)
        __len__, data_ptr = lambda self: 2, lambda self: 64

    module = SimpleNamespace(pixels_cuda=lambda *_: launched.append(current[-1]) or "")
    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    ours = CudaExecutor(torch.float32, torch.device("cpu")).input([], (3, 4, 5), None)
    ours.bind(compiled=True)
    ours.prepare(Image(), Image())
    assert launched == [torch.device("cuda", 1)] and current == []


@results
def test_inputs_that_have_no_kernel():
    ours = CudaExecutor(torch.float32, torch.device(DEVICE))
    assert type(ours.input([], (5, 4, 4), None)) is Input
    assert type(ours.input([("add", 1.0)] * 9, (3, 4, 4), None)) is Input


class Network(nn.Module):
    """All kinds of stages: an upsampled normalised image, both poolings, batch norm by itself, sums, a segment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.first = nn.Conv2d(3, 9, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(9)
        self.block = nn.Sequential(nn.Conv2d(9, 9, 1), nn.BatchNorm2d(9))
        self.last = nn.Linear(9, 4)

    def forward(self, x):
        x = nn.functional.interpolate((x - self.mean) / 0.25, size=(15, 13))
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 3, 2, 1)
        x = (self.block(x) + x).relu()
        x = nn.functional.avg_pool2d(nn.functional.softplus(nn.functional.silu(x)), 2, 1)
        return self.last(x.mean((2, 3)))


def networks():
    torch.manual_seed(0)
    models = [CifarResNet(num_classes=4, width=8, blocks=(1, 1)), Network()]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return models


@results
@pytest.mark.parametrize(
    "number, dtype",
    [
        (1, torch.float16),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
        pytest.param(0, torch.float32, marks=pytest.mark.slow),
        pytest.param(0, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_whole_plans(number, dtype, monkeypatch):
    model = networks()[number].to(DEVICE).eval()
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(2, 3, 8, 8, generator=generator).to(DEVICE), torch.tensor([0, 3], device=DEVICE)
    outputs, amp = [], None if dtype == torch.float32 else dtype
    monkeypatch.setattr(CudaConvolution, "algorithm", lambda *_: CONFIGS[0])
    # In half precision two right executors may pass a ReLU on different sides: both are near float32.
    for executor, precision in ((TorchExecutor, torch.float32), (CudaExecutor, dtype)):
        monkeypatch.setattr(cache, "executor_for", executor)
        program = cache.PlanCache().program(model, images, precision)
        program.fold(model)
        with torch.no_grad():
            logits, kept = program.forward(images, None, differentiable=True)
            program.logits(images.flip(0))
            gradient = program.backward(images, torch.linspace(-1, 1, 8, device=DEVICE).view(2, 4), kept, None)
        outputs.append((logits, gradient))
    for want, got in zip(*outputs, strict=True):
        assert (got - want).norm() <= (16 * TOLERANCE[dtype] + 1e-5) * want.norm()
    made = PGD(model, steps=1, random_start=False, engine="plan", amp_dtype=amp)(images, labels)
    assert (made - images).abs().max() <= 8 / 255 + 1e-6 and not torch.equal(made, images)


@host
def test_every_step_of_a_resnet50_is_one_launch(monkeypatch):
    model, images = resnet50(num_classes=8).eval(), torch.rand(1, 3, 64, 64)
    monkeypatch.setattr(cache, "executor_for", CudaExecutor)
    monkeypatch.setattr(CudaConvolution, "algorithm", lambda *_: kernels.CONVOLUTION_CONFIGS[0])
    monkeypatch.setattr(cache, "difference", lambda *_: "")  # which would run the kernels
    program = cache.PlanCache().program(model, images, torch.bfloat16)
    program.fold(model)
    bound = program.bound(1)
    for step in (*bound.forward, *bound.backward):
        with aot._recording(None) as launches:
            step()
        assert len(launches) == 1
    assert len(bound.forward) == len(bound.backward) == 56
