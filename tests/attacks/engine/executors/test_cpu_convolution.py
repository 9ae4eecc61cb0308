"""The compiled convolutions against float64, called as the attack engine calls them: with pointers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attacks.engine.executors.helpers import ISAS, Result, first, last, pointers, unpack
from tests.ops.cases import DTYPES, UNIT
from twins_fast.attacks.engine.convolution import Convolution, axis_backward
from twins_fast.ops import native

if native._C is None:
    pytest.skip(f"no compiled kernels: {native.missing}", allow_module_level=True)

from twins_fast.attacks.engine.executors import cpu  # noqa: E402  it needs the compiled kernels
from twins_fast.attacks.engine.executors.cpu import (  # noqa: E402  they need the compiled kernels
    KernelConvolution,
    LibraryConvolution,
    Workspace,
)

ALGORITHMS = ["gemm", "direct", "winograd", "winograd4"]
TILES = {"winograd": 2, "winograd4": 4}  # F(2x2, 3x3) and F(4x4, 3x3)


def cook_toom(points):
    """The matrices for the points and infinity, in float64."""
    others = [[q for q in points if q != p] for p in points]
    output = [[p**j for p in points] + [j == len(points) - 2] for j in range(len(points) - 1)]
    kernel = [[p**j / math.prod(p - q for q in rest) for j in range(3)] for p, rest in zip(points, others, strict=True)]
    monic = [polynomial(rest) + [0] for rest in others] + [polynomial(points)]
    return [torch.tensor(rows, dtype=torch.float64) for rows in (monic, [*kernel, [0, 0, 1]], output)]


def polynomial(roots):
    """The coefficients of the product of x - root, lowest first."""
    coefficients = [1.0]
    for root in roots:
        raised, scaled = [0.0, *coefficients], [root * c for c in coefficients] + [0.0]
        coefficients = [a - b for a, b in zip(raised, scaled, strict=True)]
    return coefficients


MATRICES = {  # of a tile's size: B^T, G and A^T
    2: [
        torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double(),
        torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).double() / 2,
        torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]]).double(),
    ],
    4: cook_toom([0, 3 / 4, -3 / 4, 3 / 2, -3 / 2]),
}


def forward_phases(kernel, padding, dilation):
    offsets = [(k * dilation - padding, k) for k in range(kernel)]
    return [(0, 0, [(dy, dx, [(ky, kx)]) for dy, ky in offsets for dx, kx in offsets])]


def gradient_phases(kernel, stride, padding, dilation):
    """Input pixel i gets weight k from output pixel (i + padding - k * dilation) / stride, where that is whole."""

    def taps(residue):
        positions = [(residue + padding - k * dilation, k) for k in range(kernel)]
        return [(p // stride, k) for p, k in positions if p % stride == 0]

    return [
        (oy, ox, [(dy, dx, [(ky, kx)]) for dy, ky in taps(oy) for dx, kx in taps(ox)])
        for oy in range(stride)
        for ox in range(stride)
    ]


def winograd(x, weight, size, of=lambda matrix: matrix):
    """The convolution of ``x`` as the kernels compute it, with ``of`` each matrix."""
    inputs, kernel, output = (of(matrix) for matrix in MATRICES[size])
    height, width = x.shape[2:]
    down, across = -(-height // size), -(-width // size)
    padded = F.pad(x, (1, size * across + 1 - width, 1, size * down + 1 - height))
    tiles = padded.unfold(2, size + 2, size).unfold(3, size + 2, size)
    tiles = torch.einsum("ij,ncyxjk,lk->ncyxil", inputs, tiles, inputs)
    weight = torch.einsum("ij,ocjk,lk->ocil", kernel, weight, kernel)
    products = torch.einsum("ncyxil,ocil->noyxil", tiles, weight)
    results = torch.einsum("pi,noyxil,ql->noypxq", output, products, output)
    return results.reshape(*results.shape[:2], size * down, size * across)[:, :, :height, :width]


@pytest.mark.parametrize("size", MATRICES)
def test_matrices(size):
    x, weight = torch.randn(2, 3, 7, 9).double(), torch.randn(5, 3, 3, 3).double()
    torch.testing.assert_close(winograd(x, weight, size), F.conv2d(x, weight, padding=1))


class Layer:
    """A convolution or its input gradient, packed, with the float64 results of random inputs."""

    def __init__(self, size, channels, outputs, kernel=3, stride=1, padding=None, dilation=1, images=2, **options):
        padding = kernel // 2 * dilation if padding is None else padding
        self.geometry = dict(stride=stride, padding=padding, dilation=dilation)
        self.gradient, self.dtype = options.get("gradient", False), options.get("dtype", torch.float32)
        self.algorithm, self.isa = options.get("algorithm", "gemm"), options.get("isa", "")
        self.seed, self.groups = options.get("seed", 0), options.get("groups", 1)
        generator = torch.Generator().manual_seed(self.seed)
        self.weight = torch.randn(outputs, channels // self.groups, kernel, kernel, generator=generator)
        self.scale = torch.randn(outputs, generator=generator) if options.get("scale") else None
        self.adjoint = options.get("adjoint", False)  # by what is packed for the convolution
        out, *steps_and_phases = self.plan(size)
        ends = (size, channels, out, outputs), (out, outputs, size, channels)
        self.in_size, self.inputs, self.out_size, self.outputs = ends[self.gradient]
        self.x = torch.randn(images, self.inputs, *self.in_size, generator=generator).to(self.dtype)
        self.products = kernel * kernel * self.inputs // self.groups
        shapes = self.in_size, self.inputs, self.out_size, self.outputs
        kind = self.algorithm, native.dtype_name(self.dtype)
        self.conv = native._C.Conv(*kind, *shapes, *steps_and_phases, self.isa, self.adjoint, self.groups)
        self.packer = self.conv
        if self.adjoint:
            phases = forward_phases(kernel, padding, dilation)
            self.packer = native._C.Conv(*kind, *shapes[2:], *shapes[:2], (1, 1), (1, 1), phases, self.isa)
            assert self.packer.packed_bytes == self.conv.packed_bytes
        self.prepare(options.get("pack_threads", 2))

    def __repr__(self):  # what hypothesis prints of a failing case
        return str({name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)})

    def plan(self, size):
        kernel = self.weight.shape[2]
        stride, padding, dilation = (self.geometry[name] for name in ("stride", "padding", "dilation"))
        out = tuple((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size)
        if self.gradient:
            return out, (1, 1), (stride, stride), gradient_phases(kernel, stride, padding, dilation)
        return out, (stride, stride), (1, 1), forward_phases(kernel, padding, dilation)

    def prepare(self, threads):
        packed = Result((self.packer.packed_bytes,), torch.uint8)
        weight, scale, target = pointers(self.weight, self.scale, packed.tensor)
        transposed = self.gradient and not self.adjoint
        assert self.packer.pack(weight, tuple(self.weight.shape), scale, transposed, target, threads) == ""
        self.packed = packed.get()

    def exact(self, x, weight):
        """In float64; ``x`` and ``weight`` may be magnitudes."""
        if self.gradient:
            padding, stride, dilation = (self.geometry[name] for name in ("padding", "stride", "dilation"))
            full = [(n - 1) * stride - 2 * padding + dilation * (weight.shape[2] - 1) + 1 for n in self.in_size]
            rest = [want - n for want, n in zip(self.out_size, full, strict=True)]
            return F.conv_transpose2d(x, weight, None, stride, padding, rest, self.groups, dilation)
        return F.conv2d(x, weight, None, **self.geometry, groups=self.groups)

    def run(self, x=None, threads=2, bias=None, other=None, mask=None, relu=False, want_bits=False, in_place=False):
        x = last(self.x if x is None else x)
        shape = len(x), *self.out_size, self.outputs
        y, bits = Result(shape, self.dtype), Result((*shape[:3], (self.outputs + 7) // 8), torch.uint8)
        workspace = Result((self.conv.workspace_bytes(threads),), torch.uint8)
        other = None if other is None else last(other)
        if in_place:
            y.tensor.copy_(other)
            other = y.tensor
        operands = pointers(x, self.packed, bias, other, mask, y.tensor, bits.tensor if want_bits else None)
        assert self.conv.run(len(x), *operands, relu, *pointers(workspace.tensor), threads) == ""
        workspace.get()
        return (first(y.get()), bits.get()) if want_bits else first(y.get())

    def magnitudes(self, x, weight):
        """Sums of the magnitudes that each result is made of."""
        x, weight = x.double().abs(), weight.abs()
        if self.algorithm not in TILES:
            return self.exact(x, weight)
        # All of Winograd's transforms, of magnitudes: differences that cancel were rounded nevertheless.
        if self.adjoint:
            return winograd(x.flip(2, 3), weight.transpose(0, 1), TILES[self.algorithm], torch.abs).flip(2, 3)
        if self.gradient:
            weight = weight.transpose(0, 1).flip(2, 3)
        return winograd(x, weight, TILES[self.algorithm], torch.abs)

    def limit(self, x=None, added=0):
        """How far from exact results may be, to first order; ``added`` are the magnitudes of what the epilogue adds.

        Each of the roundings of a float32 sum is at most 2^-24 of the magnitudes: one per product, and a few in
        the transforms, of their coefficients too, and in the epilogue. In bfloat16 the two sides of a product may
        be rounded (the weight, and Winograd's inputs) by the unit roundoff each, and the result is rounded in its
        own type. What Winograd's transforms do to such errors is in the magnitudes.
        """
        magnitudes = self.magnitudes(self.x if x is None else x, self.scaled())
        unit, sides = UNIT[self.dtype], 2.02 * (self.dtype == torch.bfloat16)
        tiny = 2.0**-24 if self.dtype == torch.float16 else 2.0**-100  # subnormal numbers
        sums = (magnitudes + added) * 2.0**-24 * (self.products + 32)
        return sums + unit * (sides * magnitudes + 1.02 * (magnitudes + added)) + tiny

    def scaled(self):
        weight = self.weight.double()
        return weight if self.scale is None else weight * self.scale.double()[:, None, None, None]

    def want(self, x=None):
        return self.exact((self.x if x is None else x).double(), self.scaled())

    def check(self, y):
        assert ((y.double() - self.want()).abs() <= self.limit()).all()


SIZES = st.sampled_from([*range(1, 10), 17, 31])
CHANNELS = st.sampled_from([1, 3, 5, 8, 17, 33, 64])


@st.composite
def layers(draw, algorithm, isa, dtype):
    options = dict(algorithm=algorithm, isa=isa, dtype=dtype)
    options |= dict(gradient=draw(st.booleans()), scale=draw(st.booleans()), seed=draw(st.integers(0, 9)))
    options |= dict(images=draw(st.sampled_from([1, 2, 5])), pack_threads=draw(st.integers(1, 3)))
    if algorithm not in TILES:
        kernel, dilation = draw(st.sampled_from([1, 3, 5, 7])), draw(st.sampled_from([1, 1, 2]))
        options |= dict(kernel=kernel, dilation=dilation, stride=draw(st.integers(1, 3)))
        reach = dilation * (kernel - 1) + 1
        options["padding"] = draw(st.sampled_from(sorted({0, reach // 2})))
        sizes = SIZES.map(lambda size: max(size, reach - 2 * options["padding"]))
    else:
        sizes = SIZES
        options["adjoint"] = options["gradient"] and draw(st.booleans())
    channels, outputs = draw(CHANNELS), draw(CHANNELS)
    if algorithm == "direct":
        options["groups"] = draw(st.sampled_from([1, 3, 5, 12, 17, 40]))
        of_group = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (24, 8), (16, 40)]))
        channels, outputs = (n * options["groups"] for n in of_group)
    return Layer((draw(sizes), draw(sizes)), channels, outputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_random_layers(algorithm, isa, dtype):
    @settings(max_examples=20, deadline=None)
    @given(layers(algorithm, isa, dtype), st.integers(1, 3))
    def check(layer, threads):
        layer.check(layer.run(threads=threads))

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize(
    ("algorithm", "size", "channels", "outputs", "options"),
    [
        ("winograd", (33, 31), 64, 40, {}),  # several blocks
        ("winograd4", (65, 63), 64, 40, {}),
        ("winograd", (4, 4), 520, 100, {}),  # a weight that several groups of tiles share
        ("winograd4", (12, 13), 270, 100, {}),
        ("winograd4", (12, 13), 600, 70, {}),  # inputs larger than the cache
        ("winograd", (12, 13), 90, 260, dict(gradient=True, adjoint=True)),
        ("winograd4", (33, 31), 75, 260, dict(gradient=True, adjoint=True)),
        ("direct", (30, 29), 300, 300, dict(kernel=5, groups=300)),
        ("direct", (33, 31), 160, 160, dict(kernel=3, groups=160, stride=2, gradient=True)),
        ("direct", (17, 19), 136, 136, dict(kernel=9, groups=136)),  # three times three taps side by side
        ("direct", (14, 15), 192, 192, dict(groups=48)),
        ("direct", (14, 15), 192, 288, dict(groups=4, stride=2, gradient=True)),
        ("gemm", (1, 1), 600, 130, dict(kernel=1, images=7)),  # a linear layer
        ("gemm", (30, 29), 48, 70, dict(kernel=1)),
        ("gemm", (16, 16), 64, 96, dict(stride=2, gradient=True)),
        ("gemm", (9, 9), 700, 33, dict(stride=2)),
        ("gemm", (64, 64), 3, 20, dict(kernel=16, stride=16, padding=0)),
        ("gemm", (40, 40), 3, 20, dict(kernel=33, padding=0)),
    ],
)
def test_large_layers(dtype, algorithm, size, channels, outputs, options):
    for isa in ISAS:
        layer = Layer(size, channels, outputs, algorithm=algorithm, isa=isa, dtype=dtype, **options)
        layer.check(layer.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_epilogue(algorithm, isa, dtype):
    # Every combination for a panel and a part of one; a few for less than a vector.
    for outputs, gradient, every in (37, False, 1), (5, True, 7):
        adjoint, groups = gradient and algorithm in TILES, outputs if algorithm == "direct" else 1
        options = dict(algorithm=algorithm, isa=isa, dtype=dtype, gradient=gradient, adjoint=adjoint, groups=groups)
        layer = Layer((3, 4), outputs, outputs, **options)
        plain, plain_want = layer.run(threads=1), layer.want()
        bias, other = torch.randn(outputs), torch.randn(plain.shape).to(dtype)
        mask = torch.randint(0, 256, (len(plain), *layer.out_size, (outputs + 7) // 8), dtype=torch.uint8)
        unmasked = first(unpack(mask, outputs)[0])
        limit = layer.limit(added=bias.abs()[:, None, None] + other.double().abs())
        choices = [None, bias], [None, "apart", "in place"], [None, mask], [None, "relu", "with bits"]
        for bias_, other_, mask_, relu in list(itertools.product(*choices))[::every]:
            arguments = dict(bias=bias_, other=None if other_ is None else other, mask=mask_, relu=relu is not None)
            y = layer.run(threads=1, **arguments, in_place=other_ == "in place", want_bits=relu == "with bits")
            want, exact = plain_want, plain  # float32 sums are known, and so are its results
            for term in (None if bias_ is None else bias_[:, None, None], other if other_ else None):
                if term is not None:
                    want, exact = want + term, exact + term
            if relu == "with bits":
                y, bits = y
                passes, padding_is_zero = unpack(bits, outputs)
                passes = first(passes)
                assert padding_is_zero and (passes == (want > 0))[want.abs() > limit].all()
                assert dtype != torch.float32 or torch.equal(passes, exact > 0)
            if relu:
                want, exact = want.relu(), exact.relu()
            if mask_ is not None:
                want, exact = want * unmasked, exact * unmasked
                assert (y[~unmasked] == 0).all()
            assert ((y.double() - want).abs() <= limit).all()
            assert dtype != torch.float32 or torch.equal(y, exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
def test_bits_and_values_of_nan(algorithm, isa, dtype):
    channels, groups = (17, 17) if algorithm == "direct" else (5, 1)
    layer = Layer((7, 8), channels, 17, algorithm=algorithm, isa=isa, dtype=dtype, groups=groups)
    clean = layer.run(relu=True)
    x = layer.x.clone()
    x[1, 3, 3, 4] = math.nan
    y, bits = layer.run(x, relu=True, want_bits=True)
    rows, columns = torch.arange(7)[:, None], torch.arange(8)
    if algorithm not in TILES:
        reached = ((rows - 3).abs() <= 1) & ((columns - 4).abs() <= 1)
    else:  # tiles whose inputs, one more pixel on each side, hold it
        size = TILES[algorithm]
        top, left = rows // size * size, columns // size * size
        reached = (top - 1 <= 3) & (top + size >= 3) & (left - 1 <= 4) & (left + size >= 4)
    reached = torch.stack([torch.zeros_like(reached), reached])[:, None].expand_as(y)
    if algorithm == "direct":
        reached = reached & (torch.arange(17) == 3)[:, None, None]
    assert y.isfinite()[~reached].all() and torch.equal(y[~reached], clean[~reached])
    passes = first(unpack(bits, 17)[0])
    assert passes[y.isnan()].all()
    if algorithm not in TILES:
        assert y[reached].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize(
    ("algorithm", "size", "options"),
    [
        ("winograd", (9, 9), {}),
        ("winograd", (4, 4), {}),
        ("winograd4", (9, 9), {}),
        ("winograd4", (4, 4), {}),
        ("winograd4", (9, 9), dict(gradient=True, adjoint=True)),
        ("winograd4", (2, 2), dict(gradient=True, adjoint=True)),  # panels are divided
        ("gemm", (9, 9), dict(stride=2)),
        ("gemm", (9, 9), dict(stride=2, gradient=True)),
        ("direct", (9, 9), dict(stride=2, gradient=True, groups=100)),
        ("direct", (9, 9), dict(groups=25)),
        ("gemm", (4, 5), {}),  # images share tiles
        ("gemm", (1, 1), dict(kernel=1)),
    ],
)
def test_deterministic(dtype, algorithm, size, options):
    channels = 100 if algorithm == "direct" else 40
    layer = Layer(size, channels, 100, algorithm=algorithm, dtype=dtype, images=9, **options)
    want = layer.run(threads=1)
    for threads in 2, 3, 8:
        packed = layer.packed.clone()
        layer.prepare(threads=threads)
        assert torch.equal(layer.packed, packed)
        assert torch.equal(layer.run(threads=threads), want)
    order = torch.tensor([8, 3, 5, 0])
    assert torch.equal(layer.run(layer.x[order]), want[order])


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (4, 3)])
def test_parts_of_tiles(kernel, stride):
    """Tiles of 16 rows and lines of 32 channels, of which a matrix unit has whole ones."""
    options = dict(dtype=torch.bfloat16, kernel=kernel, stride=stride, padding=kernel // 2)
    for channels, outputs in (16, 24), (32, 16), (40, 72), (72, 40):
        for width, images in (1, 1), (1, 17), (7, 5), (15, 1), (17, 2), (31, 1), (33, 3):
            for gradient in False, True:
                layer = Layer((4, 3 + width), channels, outputs, images=images, gradient=gradient, **options)
                layer.check(layer.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize("kernel", [1, 3])
def test_an_image_of_nan_is_apart(kernel, dtype):
    for isa, size in itertools.product(ISAS, [(1, 1), (4, 4), (5, 18)]):
        layer = Layer(size, 40, 33, kernel=kernel, isa=isa, dtype=dtype, images=6)
        clean, x = layer.run(), layer.x.clone()
        x[2] = math.nan
        y = layer.run(x)
        others = [0, 1, 3, 4, 5]
        assert torch.equal(y[others], clean[others]) and y[2].isnan().all()


@pytest.mark.skipif("amx" not in ISAS, reason="no matrix unit")
def test_matrix_unit_is_shared_with_onednn():
    """Both configure it: neither may see what the other left."""
    layer = Layer((5, 6), 40, 33, isa="amx", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    operands = [
        [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        for shapes in ([(48, 64), (64, 80)], [(3, 100), (100, 7)], [(2, 32, 9, 9), (48, 32, 3, 3)])
    ]

    def library():
        return [F.conv2d(a, b, padding=1) if a.dim() == 4 else a @ b for a, b in operands]

    want, mine = library(), layer.run()
    for (a, b), y in zip(operands, want, strict=True):
        exact = F.conv2d(a.float(), b.float(), padding=1) if a.dim() == 4 else a.float() @ b.float()
        torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-1)
    for _ in range(3):
        assert torch.equal(layer.run(), mine)
        assert all(map(torch.equal, library(), want))


class Stem(Layer):
    """A convolution of an image upsampled ``factor`` times, without the upsampled image."""

    def __init__(self, size, factor, kernel, stride, **options):
        self.factor = factor
        super().__init__(size, 3, 20, kernel, stride, **options)

    def plan(self, size):
        kernel, stride, padding = self.weight.shape[2], self.geometry["stride"], self.geometry["padding"]
        period = math.lcm(self.factor, stride)
        out = [(n * self.factor + 2 * padding - kernel) // stride + 1 for n in size]
        reads, writes = period // self.factor, period // stride  # pixels of the image and of the result in a period
        if self.gradient:
            reads, writes = writes, reads

        def taps(residue):
            kernel_indices = {}
            for k in range(kernel):
                if not self.gradient:
                    kernel_indices.setdefault((residue * stride - padding + k) // self.factor, []).append(k)
                    continue
                for upsampled in range(residue * self.factor, (residue + 1) * self.factor):
                    if (upsampled + padding - k) % stride == 0:
                        kernel_indices.setdefault((upsampled + padding - k) // stride, []).append(k)
            return kernel_indices.items()

        phases = [
            (oy, ox, [(dy, dx, list(itertools.product(ky, kx))) for dy, ky in taps(oy) for dx, kx in taps(ox)])
            for oy in range(writes)
            for ox in range(writes)
        ]
        return tuple(out), (reads, reads), (writes, writes), phases

    def exact(self, x, weight):
        if not self.gradient:
            return F.conv2d(F.interpolate(x, scale_factor=self.factor, mode="nearest"), weight, None, **self.geometry)
        image = torch.zeros(len(x), self.outputs, *self.out_size, dtype=x.dtype, requires_grad=True)
        upsampled = F.interpolate(image, scale_factor=self.factor, mode="nearest")
        return torch.autograd.grad(F.conv2d(upsampled, weight, None, **self.geometry), image, x)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=native.dtype_name)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("factor", "kernel", "stride"), [(7, 7, 2), (2, 3, 1), (4, 7, 2), (3, 5, 3)])
def test_collapsed_stem(dtype, gradient, factor, kernel, stride):
    for isa in ISAS:
        layer = Stem((5, 6), factor, kernel, stride, isa=isa, dtype=dtype, gradient=gradient)
        layer.products = factor**2 * kernel**2 * layer.inputs
        layer.check(layer.run())


def conv(**changes):
    taps = [(y - 1, x - 1, [(y, x)]) for y in range(3) for x in range(3)]
    arguments = dict(algorithm="gemm", dtype="float32", in_size=(5, 5), in_channels=2, out_size=(5, 5))
    arguments |= dict(out_channels=3, in_step=(1, 1), out_step=(1, 1), phases=[(0, 0, taps)])
    return native._C.Conv(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(algorithm="fft"), "no algorithm fft"),
        (dict(dtype="int8"), "int8"),
        (dict(isa="none"), "instruction set"),
        (dict(adjoint=True), "only winograd"),
        (dict(groups=2), "divide"),
        (dict(groups=0), "divide"),
        (dict(out_channels=4, groups=2), "only direct"),
        (dict(algorithm="direct"), "1, 2, 4 or multiples of 8"),
        (dict(algorithm="direct", in_channels=6, out_channels=6, groups=2), "1, 2, 4 or multiples of 8"),
        (dict(algorithm="direct", in_channels=4, out_channels=8, groups=2), "1, 2, 4 or multiples of 8"),
        (dict(in_size=(0, 5)), "sizes"),
        (dict(in_channels=0), "sizes"),
        (dict(out_channels=-1), "sizes"),
        (dict(out_size=(5, 2**40)), "sizes"),
        (dict(in_step=(0, 1)), "steps"),
        (dict(out_step=(1, 0)), "steps"),
        (dict(phases=[]), "no phase writes"),
        (dict(out_step=(2, 1)), "no phase writes"),
        (dict(phases=[(0, 0, []), (1, 1, [])]), "two phases"),
        (dict(phases=[(-1, 0, [])]), "inside"),
        (dict(phases=[(0, 0, [(2**40, 0, [(0, 0)])])]), "far"),
        (dict(phases=[(0, 0, [(-(2**63), 0, [(0, 0)])])]), "far"),
        (dict(phases=[(0, 0, [(0, 0, [(-1, 0)])])]), "slices"),
        *[
            (dict(algorithm=algorithm) | changes, "winograd needs")
            for algorithm in TILES
            for changes in (
                dict(in_size=(6, 5)),
                dict(in_step=(2, 2)),
                dict(phases=[(0, 0, [(0, 0, [(0, 0)])])]),
                dict(phases=[(0, 0, [(y, x, [(0, 0)]) for y in range(3) for x in range(3)])]),
            )
        ],
    ],
)
def test_impossible_geometry(changes, message):
    conv()
    with pytest.raises(ValueError, match=message):
        conv(**changes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride"),
    [(64, 96, 3, 1), (32, 64, 3, 2), (1056, 32, 1, 2), (64, 32, 4, 1), (64, 32, 4, 2), (40, 64, 3, 1), (64, 40, 3, 1)],
)
def test_both_directions_are_packed_at_once(channels, outputs, kernel, stride, isa):
    options = dict(kernel=kernel, stride=stride, scale=True, dtype=torch.bfloat16, isa=isa)
    convolution, gradient = (Layer((5, 6), channels, outputs, gradient=g, **options) for g in (False, True))
    for threads in (1, 2, 3):
        both = [Result((layer.conv.packed_bytes,), torch.uint8) for layer in (convolution, gradient)]
        weight, scale, *packed = pointers(convolution.weight, convolution.scale, *(b.tensor for b in both))
        shape = tuple(convolution.weight.shape)
        status = convolution.conv.pack(weight, shape, scale, False, packed[0], threads, gradient.conv, packed[1])
        assert status == ""
        for layer, result in zip((convolution, gradient), both, strict=True):
            assert torch.equal(result.get(), layer.packed)
    for other, memory in (gradient.conv, 0), (Layer((5, 6), channels + 32, outputs, gradient=True, **options).conv, 1):
        status = convolution.conv.pack(weight, shape, scale, False, packed[0], 1, other, memory and packed[1])
        assert status == "argument out of range"


def test_bad_arguments_are_refused():
    layer = Layer((5, 5), 4, 6)
    weight, packed = pointers(layer.weight, layer.packed)
    refused = "argument out of range"
    for kernel in (6, 5, 3, 3), (5, 4, 3, 3), (6, 4, 2, 3), (6, 4, 3, 2), (6, 4, 0, 3), (6, 4, 3, 2**40):
        assert layer.conv.pack(weight, kernel, 0, False, packed, 2) == refused
    assert layer.conv.pack(weight, (6, 4, 3, 3), 0, True, packed, 2) == refused
    assert layer.conv.pack(0, (6, 4, 3, 3), 0, False, packed, 2) == refused
    assert layer.conv.pack(weight, (6, 4, 3, 3), 0, False, packed, 0) == refused
    assert layer.conv.run(-1, packed, packed, 0, 0, 0, packed, 0, False, packed, 2) == refused
    assert layer.conv.run(1, 0, packed, 0, 0, 0, packed, 0, False, packed, 2) == refused
    assert layer.conv.run(1, packed, packed, 0, 0, 0, packed, 0, False, packed, 0) == refused
    assert layer.conv.run(0, 0, 0, 0, 0, 0, 0, 0, False, 0, 2) == ""  # no images: nothing to do
    adjoint = conv(algorithm="winograd", adjoint=True)
    assert adjoint.pack(weight, (2, 3, 3, 3), 0, True, packed, 2) == refused  # it has no weights of its own


@pytest.mark.parametrize(
    ("channels", "isa", "shared"),
    [(64, "avx512", False), (288, "avx512", True), (288, "amx", True), (288, "avx2", False)],
)
def test_weights_of_both_directions(channels, isa, shared, monkeypatch):
    monkeypatch.setattr(cpu, "_isa", lambda: isa)
    geometry = Convolution(channels, (6, 7), channels, (6, 7), (3, 3), (1, 1), (1, 1))
    convolution = KernelConvolution(geometry, torch.float32, Workspace(), "winograd4")
    directions = convolution._forward, convolution._backward
    assert len({direction._packed.data_ptr() for direction in directions}) == 2 - shared
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    scale = torch.rand(channels, generator=generator) + 0.5
    x, g = (torch.randn(2, channels, 6, 7, generator=generator) for _ in range(2))
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (x, g))
    y, dx = torch.empty_like(x), torch.empty_like(x)
    for factor in (1.0, 0.5):  # packed again, both see it
        convolution.fold(weight * factor, scale)
        convolution.bind_forward(x, None, None, y, None)()
        convolution.bind_backward(g, None, None, dx)()
        folded = weight * factor * scale.view(-1, 1, 1, 1)
        for got, want in (y, F.conv2d(x, folded, padding=1)), (dx, F.conv_transpose2d(g, folded, padding=1)):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [6, 7])
def test_no_pixel_sees_two_taps_of_a_single_result(size, padding, dilation):
    kernel = (size + 2 * padding - 1) // dilation + 1
    shape = dict(kernel=(kernel, 2), stride=(1, 3), padding=(padding, 0), dilation=(dilation, 1))
    assert Convolution(8, (size, 5), 5, (1, 2), **shape).apart == (1, 3)
    geometry = Convolution(8, (size, 2), 5, (1, 1), **shape)
    assert geometry.apart == (dilation * (kernel - 1) + 1, 2)
    _, _, phases = axis_backward(kernel, geometry.apart[0], padding, dilation, 1)
    assert all(len(taps) <= 1 for taps in phases)


@pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "with sum and mask"])
@pytest.mark.parametrize(
    "channels, size, kernel, stride, padding, dilation",
    [
        (3, (24, 32), (7, 7), (2, 2), (3, 3), (1, 1)),
        (3, (31, 26), (7, 7), (2, 2), (3, 3), (1, 1)),
        (1, (13, 10), (5, 3), (1, 2), (0, 1), (1, 1)),
        (4, (9, 12), (3, 3), (1, 1), (1, 1), (1, 1)),
        (2, (17, 17), (3, 3), (2, 1), (2, 0), (1, 3)),
        (3, (32, 48), (16, 16), (16, 16), (0, 0), (1, 1)),
        (3, (41, 36), (11, 11), (4, 4), (2, 2), (1, 1)),
        (3, (11, 11), (1, 1), (3, 3), (0, 0), (1, 1)),
        (3, (12, 10), (12, 10), (1, 1), (0, 0), (1, 1)),  # one result
        (8, (4, 6), (4, 5), (1, 3), (0, 0), (1, 1)),
        (6, (3, 9), (5, 4), (1, 2), (1, 0), (1, 1)),  # one row
        (7, (5, 6), (3, 3), (1, 1), (0, 0), (2, 2)),
    ],
)
def test_gradient_of_an_image(channels, size, kernel, stride, padding, dilation, epilogue):
    geometry = [channels, size, 20, None, kernel, stride, padding, dilation]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, channels, *kernel, generator=generator)
    scale = torch.rand(20, generator=generator) + 0.5
    x = torch.zeros(3, channels, *size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, (weight * scale.view(-1, 1, 1, 1)).double(), None, stride, padding, dilation)
    geometry[3] = tuple(y.shape[2:])
    g = torch.randn(y.shape, generator=generator)
    (want,) = torch.autograd.grad(y, x, g.double())
    convolution = KernelConvolution(Convolution(*geometry), torch.float32, Workspace(), "gemm")
    convolution.fold(weight, scale)
    g, dx = (v.contiguous(memory_format=torch.channels_last) for v in (g, torch.full(x.shape, float("nan"))))
    other = mask = None
    if epilogue:
        other = torch.randn(x.shape, generator=generator).contiguous(memory_format=torch.channels_last)
        bits = torch.randint(0, 2**channels, (3, *size), dtype=torch.uint8, generator=generator)
        passes = torch.stack([bits >> c & 1 for c in range(channels)], 1)
        want, mask = (want + other) * passes, bits.flatten()
    convolution.bind_backward(g, other, mask, dx)()
    torch.testing.assert_close(dx, want.float(), rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (1, 2), (2, 1)])
def test_weights_for_onednn(stride, groups):
    """Each direction has its own in oneDNN's layout, and only a gradient by PyTorch needs them in another."""
    size = (8 // stride, 6 // stride)
    geometry = Convolution(8, (8, 6), 12, size, (3, 3), (stride, stride), (1, 1), (1, 1), groups)
    convolution = LibraryConvolution(geometry, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(12, 8 // groups, 3, 3, generator=generator), torch.rand(12, generator=generator)
    x, g = torch.randn(2, 8, 8, 6, generator=generator), torch.randn(2, 12, *size, generator=generator)
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (x, g))
    for factor in (1.0, 0.5):  # packed again, both see it
        convolution.fold(weight * factor, scale)
        folded = weight * factor * scale.view(-1, 1, 1, 1)
        leaf = x.clone().requires_grad_()
        want = F.conv2d(leaf, folded, None, stride, 1, 1, groups)
        torch.testing.assert_close(convolution.forward(x), want.detach())
        torch.testing.assert_close(convolution.backward(g), torch.autograd.grad(want, leaf, g)[0])
    assert (convolution.weight is None) == (stride == 1)
