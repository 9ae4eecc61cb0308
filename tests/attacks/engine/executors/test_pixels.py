"""Images to what a network sees of them and back, against PyTorch: equal to the bit wherever that is defined."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attacks.engine.executors.helpers import ISAS, Result, last, pointers
from tests.ops.cases import DTYPES
from twins_fast.ops.native import _C, dtype_name

pytestmark = pytest.mark.skipif(_C is None, reason="no compiled module")
OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}


class Program:
    """A program of the compiled module, and the same in PyTorch."""

    def __init__(self, steps, channels, size, out_size=None):
        self.steps, self.channels, self.size, self.out_size = steps, channels, size, out_size or size
        self.tables = [
            F.interpolate(torch.arange(n).float().view(1, 1, n), m, mode="nearest").int().flatten().tolist()
            for n, m in zip(self.size, self.out_size, strict=True)
        ]
        listed = [(k, rest[:2], rest[2]) if k == "clamp" else (k, rest[0].tolist(), 0) for k, *rest in steps]
        self.compiled = _C.InputProgram(listed, channels, self.size, *self.tables)

    def torch(self, x):
        """The result, float32 NCHW."""
        for kind, *arguments in self.steps:
            if kind == "clamp":
                low, high, at_bounds = arguments
                inside = (x >= low) & (x <= high) if at_bounds else (x > low) & (x < high)
                x = torch.where(inside, x, x.clamp(low, high).detach())
            else:
                x = OPERATIONS[kind](x, arguments[0][:, None, None])
        rows, columns = self.tables
        return x[:, :, rows][:, :, :, columns]

    def gradient(self, x, g):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(self.torch(leaf), leaf, g)[0]

    def prepare(self, x, dtype, **how):
        out = Result((len(x), *self.out_size, self.channels), dtype)
        assert self.compiled.prepare(len(x), dtype_name(dtype), *pointers(x, out.tensor), **how) == ""
        return out.get()


def same(a, b):
    """Equal to the bit, but for the payload of a NaN."""
    a, b = a.contiguous(), b.contiguous()
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(bits)[~a.isnan()], b.view(bits)[~b.isnan()])


def normalization(channels):
    clamp = ("clamp", 0.0, 1.0, 1)
    return [clamp, ("sub", torch.rand(channels)), ("div", torch.rand(channels) + 0.1)]


def everything(channels):
    return [
        ("clamp", 0.25, 0.75, 0),
        ("mul", torch.randn(channels)),
        ("add", torch.randn(channels)),
        ("clamp", -0.5, 0.5, 1),
        *normalization(channels)[1:],
        ("mul", torch.randn(channels)),
        ("clamp", -2.0, torch.inf, 1),
    ]


def special(x):
    """Values at which something happens, here and there."""
    values = [0.0, -0.0, 0.25, 0.75, 1.0, torch.inf, -torch.inf, torch.nan, 1e-30, -3.0, 4.0]
    flat = x.view(-1)
    flat[:: max(len(flat) // 30, 1)] = torch.tensor(values * 60)[: len(flat[:: max(len(flat) // 30, 1)])]
    return x


CASES = [  # channels, size, size of the result
    (3, (5, 33), None),
    (1, (32, 32), None),
    (3, (61, 67), None),  # more than a block
    (17, (6, 7), None),
    (3, (6, 34), (42, 238)),
    (5, (8, 8), (12, 12)),
    (64, (3, 5), (4, 7)),
    (3, (9, 7), (4, 16)),  # rows that nobody sees
    (33, (2, 3), (2, 701)),
    (3, (3, 4), (3, 4)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("channels", "size", "out_size"), CASES)
@pytest.mark.parametrize("make", [lambda c: [], everything], ids=["nothing", "everything"])
def test_prepare_and_gradient(make, channels, size, out_size, isa):
    torch.manual_seed(channels)
    program = Program(make(channels), channels, size, out_size)
    x = special(torch.rand(2, channels, *size))
    want = program.torch(x)
    for dtype in DTYPES:
        assert same(program.prepare(x, dtype, threads=2, isa=isa), last(want).to(dtype))
        # Small integers: the sums over copies are exact, in any order.
        g = torch.randint(-3, 4, want.shape).to(dtype)
        g[:, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])[: g[0, 0, 0, :2].numel()]
        d = Result(x.shape, torch.float32)
        arguments = (len(x), dtype_name(dtype), *pointers(last(g), x, d.tensor))
        assert program.compiled.gradient(*arguments, threads=2, isa=isa) == ""
        assert same(d.get(), program.gradient(x, g.float()))


def stepped(x, clean, d, alpha, eps):
    moved = (x + alpha * d.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
    return torch.where(d.isnan(), x, moved)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("channels", "size", "out_size"), CASES)
def test_step(channels, size, out_size, isa):
    torch.manual_seed(channels)
    eps = 8 / 255
    for make, alpha in ((normalization, 2 / 255), (everything, -0.5), (lambda c: [], 0.0)):
        program = Program(make(channels), channels, size, out_size)
        clean = torch.rand(3, channels, *size)
        x = clean + eps * torch.randint(-2, 3, clean.shape) / 2  # on the bounds of the ball, and outside [0, 1]
        x = x.where(torch.rand_like(x) < 0.8, 0.5)
        special(x), special(clean[1])
        for dtype in DTYPES:
            g = torch.randint(-1, 2, (3, channels, *program.out_size)).to(dtype)
            g[0, :, 0] = torch.nan
            g[1, :, -1] = -torch.inf
            g[2, :, 0] = -0.0
            d = program.gradient(x, g.float())
            want = stepped(x, clean, d, alpha, eps)
            for threads, in_place, with_out in ((1, False, True), (2, True, True), (3, True, False)):
                source, seen = x.clone(), last(g).clone()
                result = source if in_place else Result(x.shape, torch.float32).tensor
                out = Result(seen.shape, dtype)
                target = seen if in_place else out.tensor  # in place of the gradient
                count = torch.full((3,), 5)
                arguments = pointers(seen, source, clean), alpha, eps
                targets = pointers(count, result, target if with_out else None)
                how = {"threads": threads, "isa": isa}
                assert program.compiled.step(3, dtype_name(dtype), *arguments[0], *arguments[1:], *targets, **how) == ""
                out.get()
                assert same(result, want)
                assert torch.equal(count - 5, d.isnan().sum((1, 2, 3)))
                if with_out:
                    assert same(target, program.prepare(want, dtype, threads=1, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
def test_sums_over_copies(isa):
    """Real numbers: roundoff of a float32 sum of 49 terms."""
    torch.manual_seed(0)
    program = Program(normalization(3), 3, (32, 32), (224, 224))
    x, g = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 224, 224)
    d, again = torch.empty_like(x), torch.empty_like(x)
    for threads, result in ((1, d), (3, again)):
        arguments = (2, "float32", *pointers(last(g), x, result))
        assert program.compiled.gradient(*arguments, threads=threads, isa=isa) == ""
    assert torch.equal(d, again)
    want, size = (program.gradient(x, t).double() for t in (g, g.abs()))
    assert ((d - want).abs() <= 60 * 2.0**-24 * size).all()
    plain = Program(program.steps, 3, (32, 32))
    assert torch.equal(program.torch(x), F.interpolate(plain.torch(x), (224, 224), mode="nearest"))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_program(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    channels = data.draw(st.integers(1, 20))
    size = data.draw(st.tuples(*[st.integers(1, 40)] * 2))
    out_size = data.draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 90)] * 2)))
    steps = []
    for kind in data.draw(st.lists(st.sampled_from(["clamp", *OPERATIONS]), max_size=8)):
        low = data.draw(st.floats(-2, 1, width=32))
        bounds = (low, low + data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1)))
        steps.append((kind, *bounds) if kind == "clamp" else (kind, torch.randn(channels)))
    program = Program(steps, channels, size, out_size)
    x = special(torch.randn(2, channels, *size))
    g = torch.randint(-2, 3, (2, channels, *program.out_size)).float()
    assert same(program.prepare(x, torch.float32, threads=2), last(program.torch(x)))
    d = torch.empty_like(x)
    assert program.compiled.gradient(2, "float32", *pointers(last(g), x, d), threads=2) == ""
    assert same(d, program.gradient(x, g))


def test_what_is_refused():
    def program(steps=(), channels=3, size=(2, 2), rows=(0, 1), cols=(0, 1)):
        return _C.InputProgram(list(steps), channels, size, list(rows), list(cols))

    clamp, add = ("clamp", [0.0, 1.0], 1), ("add", [1.0] * 3, 0)
    good = program([clamp, add])
    wrong = {
        "too many steps": [clamp] * 9,
        "in order": [("clamp", [1.0, 0.0], 1)],
        "bounds must": [("clamp", [torch.nan, 0.0], 1)],
        "0 or 1": [("clamp", [0.0, 1.0], 2)],
        "one value per channel": [("add", [1.0], 0)],
        "two bounds": [("clamp", [0.0], 1)],
        "no step square": [("square", [1.0] * 3, 0)],
    }
    for words, steps in wrong.items():
        with pytest.raises(ValueError, match=words):
            program(steps)
    for step in (("add",), ("add", 1.0, 0), ()):
        with pytest.raises(TypeError):
            program([step])
    wrong = ({"rows": (1, 0)}, {"cols": (0, 2)}, {"rows": (-1, 0)}, {"rows": ()}, {"channels": 0}, {"channels": 257})
    for arguments in (*wrong, {"size": (0, 2)}):
        with pytest.raises(ValueError):
            program(**arguments)
    x, out = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 3)
    assert good.prepare(1, "float32", *pointers(x, out), 1) == ""
    assert good.prepare(0, "float32", 0, 0, 1) == ""
    assert "range" in good.prepare(1, "float32", *pointers(x, None), 1)
    assert "range" in good.step(1, "float32", *pointers(out, x, None), 0.1, 0.1, *pointers(None, x, out), 1)
    assert "range" in good.step(1, "float32", *pointers(out, x, x), torch.nan, 0.1, *pointers(None, x, out), 1)
    assert good.step(1, "float32", *pointers(out, x, x), 0.1, 0.1, *pointers(None, x, None), 1) == ""
    assert "instruction set" in good.prepare(1, "float32", *pointers(x, out), 1, "mmx")
    with pytest.raises(ValueError, match="dtype"):
        good.prepare(1, "float64", *pointers(x, out), 1)
