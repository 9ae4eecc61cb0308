"""Random calls of two-wing batch norm, the float64 truth, and how far from it a result may be."""

import torch
from hypothesis import strategies as st

from twins_fast import ops
from twins_fast.ops import layout, phases, reference
from twins_fast.ops.wing import Wing

FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff
EPS, MOMENTUM = 1e-5, 0.1


class Case:
    """Random arguments, the float64 results, and for each the sum of the magnitudes it is made of."""

    def __init__(self, shape, split, dtype, memory_format, residual, relu, device="cpu", seed=0):
        torch.manual_seed(seed)
        channels = shape[1]
        self.split, self.relu, self.dtype, self.memory_format, self.seed = split, relu, dtype, memory_format, seed
        # Unit spread about a mean of up to 3, so that mean and variance both matter.
        self.x = (torch.randn(shape) + 3 * torch.rand(1, channels, 1, 1)).to(dtype, memory_format=memory_format)
        self.residual = torch.randn(shape).to(dtype, memory_format=memory_format) if residual else None
        self.dy = torch.randn(shape).to(dtype, memory_format=memory_format)
        self.frozen, self.adaptive = (
            [torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)]
            for _ in range(2)
        )
        self.to(device)

    def to(self, device):
        for name in ("x", "residual", "dy"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self.frozen, self.adaptive = ([t.to(device) for t in wing] for wing in (self.frozen, self.adaptive))
        return self

    def __repr__(self):  # what hypothesis prints of a failing case
        values = {name: value for name, value in vars(self).items() if not isinstance(value, (torch.Tensor, list))}
        return f"Case({values | {'shape': tuple(self.x.shape), 'residual': self.residual is not None}})"

    def run(self, function=ops.twin_batch_norm, dtype=None, relu=None, dy=None):
        """y, gradients (x, residual, frozen weight and bias, adaptive weight and bias), running statistics."""

        def leaf(tensor):
            copied = None if tensor is None else tensor.detach().clone().to(dtype or tensor.dtype)
            return None if copied is None else copied.requires_grad_()

        x, residual = leaf(self.x), leaf(self.residual)
        wings = [[t.clone().to(dtype or t.dtype) for t in wing] for wing in (self.frozen, self.adaptive)]
        leaves = [t.requires_grad_() for wing in wings for t in wing[2:]]
        y = function(x, self.split, *wings, MOMENTUM, EPS, residual, self.relu if relu is None else relu)
        inputs = [t for t in (x, residual, *leaves) if t is not None]
        grads = torch.autograd.grad(y, inputs, (self.dy if dy is None else dy).to(y.dtype), allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
        if residual is None:
            grads.insert(1, None)
        return [y.detach(), *grads, *wings[1][:2]]

    def check(self, results, name):
        # Gradients are compared under the ReLU mask of the y at hand, which is itself compared: near
        # zero either sign is right.
        mask = (results[0] > 0).double() if self.relu else 1.0
        g = self.dy.double() * mask
        expected = self.run(reference.twin_batch_norm, torch.float64, relu=False, dy=g)
        if self.relu:
            expected[0] = expected[0].relu()
        # Each float32 result is a sum of terms, with at most n roundings each. n random roundings err
        # by about sqrt(n) units; the longest float32 chains here are 512 terms, hence 23, and some for
        # the scalings. PyTorch's own kernels have chains of at most as many.
        unit = 32 * UNIT[torch.float32]
        # Half-precision images are rounded once more; PyTorch also rounds between norm, add and ReLU,
        # three roundings of intermediates that may be larger than the result.
        image_unit = 0.0 if self.dtype == torch.float32 else UNIT[self.dtype]
        subnormal = torch.finfo(self.dtype).smallest_normal  # below it the error stops shrinking with the value
        for i, (got, want, size) in enumerate(zip(results, expected, self.magnitudes(g), strict=True)):
            if want is None:
                assert got is None
                continue
            allowed = unit * size
            if i < 3:
                assert got.dtype == self.dtype and got.shape == self.x.shape
                allowed = allowed + image_unit * (3 * size if name == "torch" else want.abs() + subnormal)
            elif name == "torch" and self.dtype != torch.float32:
                allowed = allowed + image_unit * size  # its masked gradient is rounded before it is summed
            error = (got.double() - want).abs()
            assert (error <= allowed).all(), (i, (error / allowed).max().item())

    def magnitudes(self, g):
        """For each result, the sum of the absolute values of the terms that it adds up."""
        x, split = self.x.double(), self.split
        count = (x.shape[0] - split) * x.shape[2] * x.shape[3]
        y, dx = torch.zeros_like(x), torch.zeros_like(x)
        sums = []
        for wing, rows in ((self.frozen, slice(0, split)), (self.adaptive, slice(split, None))):
            half, dy = x[rows], g[rows].abs()
            mean, var, weight, bias = (t.double().view(1, -1, 1, 1) for t in wing)
            if wing is self.adaptive and count:
                mean, var = half.mean((0, 2, 3), keepdim=True), half.var((0, 2, 3), unbiased=False, keepdim=True)
            rstd = (var + EPS).rsqrt()
            xhat = (half.abs() + mean.abs()) * rstd
            y[rows] = xhat * weight.abs() + bias.abs()
            dw, db = (dy * xhat).sum((0, 2, 3)), dy.sum((0, 2, 3))
            sums += [dw, db]
            if wing is self.adaptive:
                dy = dy + (db.view_as(mean) + xhat * dw.view_as(mean)) / max(count, 1)
            # xhat's own relative error enters dx through the cancellation in x - mean.
            dx[rows] = dy * weight.abs() * rstd
        if self.residual is not None:
            y = y + self.residual.double().abs()
        half = x[split:]
        old_mean, old_var = (t.double() for t in self.adaptive[:2])
        new_mean = half.abs().mean((0, 2, 3)) if count else 0.0
        new_var = (half**2).mean((0, 2, 3)) * (count / (count - 1)) if count else 0.0
        return [y, dx, g.abs(), *sums, old_mean.abs() + new_mean, old_var + new_var]


def splits(shape):
    """The extremes that ``shape`` allows, and the middle."""
    wanted = (0, 1, shape[0] // 2, shape[0])
    return [s for s in dict.fromkeys(wanted) if s == shape[0] or (shape[0] - s) * shape[2] * shape[3] > 1]


@st.composite
def random_cases(draw, most_channels=40, most_pixels=9):
    shape = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, most_channels)),
        draw(st.integers(1, most_pixels)),
        draw(st.integers(1, most_pixels)),
    )
    split = draw(st.integers(0, shape[0]))
    if (shape[0] - split) * shape[2] * shape[3] < 2:
        split = shape[0]
    dtype, memory_format = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FORMATS))
    residual, relu, seed = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 10**6))
    return Case(shape, split, dtype, memory_format, residual, relu, seed=seed)


def check_phases(kernels, case):
    """Each phase of a backend's module against the same phase in float64, on the same inputs."""
    unit = 32 * UNIT[torch.float32]  # as in Case.check

    def close(got, want, size, of_image=False):
        allowed = unit * size + 1e-30
        if of_image and case.dtype != torch.float32:
            allowed = allowed + UNIT[case.dtype] * want.abs() + torch.finfo(case.dtype).smallest_normal
        error = (got.double() - want).abs()
        assert error.shape == want.shape and (error <= allowed).all(), (error / allowed).max().item()

    def wide(t):
        return Wing(*map(wide, t)) if isinstance(t, Wing) else None if t is None else t.double()

    x, split, count = case.x, case.split, (case.x.shape[0] - case.split) * case.x[0, 0].numel()
    frozen, adaptive = Wing(*case.frozen), Wing(*case.adaptive)

    got, want = kernels.moments(x, split), phases.moments(wide(x), split)
    close(got[0], want[0], x.double().abs().mean((0, 2, 3)))
    # The sums are about a member of the set, which is a few standard deviations off the mean.
    close(got[1], want[1], 10 * want[1])

    stats = torch.stack([want[0], (want[1] / max(count, 1) + EPS).rsqrt()]).float()
    y, bits = kernels.apply(x, case.residual, split, frozen, adaptive, stats, EPS, case.relu, case.relu)
    wings = wide(frozen), wide(adaptive), wide(stats)
    want, _ = phases.apply(wide(x), wide(case.residual), split, *wings, EPS, case.relu, False)
    frozen_scale, scale = (frozen.running_var + EPS).rsqrt() * frozen.weight, stats[1] * adaptive.weight
    scale = torch.cat([frozen_scale.expand(split, -1), scale.expand(x.shape[0] - split, -1)])
    size = (x.double().abs() + 4) * scale.double().abs()[:, :, None, None] + 10
    close(y, want, size, of_image=True)
    assert bits.shape == layout.empty_bits(x, case.relu).shape
    if case.relu:
        assert torch.equal(bits, phases._pack(y > 0, x))

    sums = kernels.sums(case.dy, x, bits, split, frozen, stats)
    want = phases.sums(wide(case.dy), wide(x), bits, split, wide(frozen), wide(stats))
    magnitude = Wing(running_mean=-wide(frozen.running_mean).abs())
    size = phases.sums(wide(case.dy).abs(), wide(x).abs(), bits, split, magnitude, -wide(stats).abs())
    close(sums, want, size)

    means = sums[2:] / max(count, 1)
    arguments = (split, frozen, adaptive, stats, means)
    got = kernels.apply_backward(case.dy, x, bits, *arguments, EPS, [True, True])
    arguments = (split, *(wide(t) for t in arguments[1:]))
    want = phases.apply_backward(wide(case.dy), wide(x), bits, *arguments, EPS, [True, True])
    slope = ((x.double().abs() + 4) * (stats[1].double().square() * means[1].double().abs())[:, None, None]).abs()
    inner = case.dy.double().abs() + means[0].double().abs()[:, None, None] + slope
    size = inner * scale.double().abs()[:, :, None, None]
    close(got[0], want[0], size, of_image=True)
    close(got[1], want[1], 0 * size, of_image=True)
    arguments = (split, frozen, adaptive, stats, means)
    neither = kernels.apply_backward(case.dy, x, bits, *arguments, EPS, [False, False])
    assert [t.numel() for t in neither] == [0, 0]
