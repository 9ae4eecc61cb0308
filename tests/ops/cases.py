"""Random calls of two-wing batch norm, and what the float64 oracle says of their results and phases."""

import torch
from hypothesis import strategies as st

from twins_fast import ops
from twins_fast.ops import layout, oracle, phases
from twins_fast.ops.oracle import UNIT
from twins_fast.ops.wing import Wing

FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS, MOMENTUM = 1e-5, 0.1


class Case:
    """Random arguments of a call, and the gradient of its result."""

    def __init__(self, shape, split, dtype, memory_format, residual, relu, device="cpu", seed=0, both_adaptive=False):
        torch.manual_seed(seed)
        channels = shape[1]
        self.split, self.relu, self.dtype, self.memory_format, self.seed = split, relu, dtype, memory_format, seed
        self.both_adaptive = both_adaptive
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

    def run(self, function=ops.twin_batch_norm):
        """The results of ``function``, with the gradients for ``dy``, on copies of the arguments."""

        def leaf(tensor):
            return None if tensor is None else tensor.detach().clone().requires_grad_()

        x, residual = leaf(self.x), leaf(self.residual)
        wings = [[t.clone() for t in wing] for wing in (self.frozen, self.adaptive)]
        leaves = [t.requires_grad_() for wing in wings for t in wing[2:]]
        options = {"both_adaptive": True} if self.both_adaptive else {}
        y = function(x, self.split, *wings, MOMENTUM, EPS, residual, self.relu, **options)
        inputs = [t for t in (x, residual, *leaves) if t is not None]
        grads = list(torch.autograd.grad(y, inputs, self.dy, materialize_grads=True))
        if residual is None:
            grads.insert(1, None)
        return oracle.Results(y.detach(), *grads, *wings[1][:2], *(wings[0][:2] if self.both_adaptive else ()))

    def errors(self, results, backend):
        """As :func:`twins_fast.ops.oracle.errors`."""
        images, wings = (self.x, self.residual, self.dy), (self.frozen, self.adaptive)
        call = oracle.Call(*images, self.split, *wings, MOMENTUM, EPS, self.relu, self.both_adaptive)
        return oracle.errors(call, results, rounded_between=backend == "torch")

    def check(self, results, backend):
        errors = self.errors(results, backend)
        assert max(errors.values()) <= 1, errors


def splits(shape, both_adaptive=False):
    """The extremes that ``shape`` allows, and the middle."""
    wanted = (0, 1, shape[0] // 2, shape[0])
    return [s for s in dict.fromkeys(wanted) if _is_allowed(shape, s, both_adaptive)]


def _is_allowed(shape, split, both_adaptive):
    halves = [shape[0] - split, *[split] * both_adaptive]
    return all(rows == 0 or rows * shape[2] * shape[3] > 1 for rows in halves)


@st.composite
def random_cases(draw, most_channels=40, most_pixels=9):
    shape = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, most_channels)),
        draw(st.integers(1, most_pixels)),
        draw(st.integers(1, most_pixels)),
    )
    split, both_adaptive = draw(st.integers(0, shape[0])), draw(st.booleans())
    if not _is_allowed(shape, split, both_adaptive):
        split, both_adaptive = shape[0], False
    dtype, memory_format = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FORMATS))
    residual, relu, seed = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 10**6))
    return Case(shape, split, dtype, memory_format, residual, relu, seed=seed, both_adaptive=both_adaptive)


def check_phases(kernels, case):
    """Each phase of a backend's module against the same phase in float64, on the same inputs."""

    def close(got, want, size, of_image=False):
        allowed = oracle.SHORT * size + oracle.TINY
        if of_image and case.dtype != torch.float32:
            allowed = allowed + UNIT[case.dtype] * want.abs().clamp_min(torch.finfo(case.dtype).smallest_normal)
        error = (got.double() - want).abs()
        assert error.shape == want.shape and (error <= allowed).all(), (error / allowed).max().item()

    def in_float64(t):
        return Wing(*map(in_float64, t)) if isinstance(t, Wing) else None if t is None else t.double()

    x, split, count = case.x, case.split, (case.x.shape[0] - case.split) * case.x[0, 0].numel()
    frozen, adaptive = Wing(*case.frozen), Wing(*case.adaptive)

    got, want = kernels.moments(x, split), phases.moments(in_float64(x), split)
    close(got[0], want[0], x.double().abs().mean((0, 2, 3)))
    # The sums are about a member of the set, which is a few standard deviations off the mean.
    close(got[1], want[1], 10 * want[1])

    stats = torch.stack([want[0], (want[1] / max(count, 1) + EPS).rsqrt()]).float()
    y, bits = kernels.apply(x, case.residual, split, frozen, adaptive, stats, EPS, case.relu, case.relu)
    wings = in_float64(frozen), in_float64(adaptive), in_float64(stats)
    want, _ = phases.apply(in_float64(x), in_float64(case.residual), split, *wings, EPS, case.relu, False)
    frozen_scale, scale = (frozen.running_var + EPS).rsqrt() * frozen.weight, stats[1] * adaptive.weight
    scale = torch.cat([frozen_scale.expand(split, -1), scale.expand(x.shape[0] - split, -1)])
    size = (x.double().abs() + 4) * scale.double().abs()[:, :, None, None] + 10
    close(y, want, size, of_image=True)
    assert bits.shape == layout.empty_bits(x, case.relu).shape
    if case.relu:
        assert torch.equal(bits, phases._pack(y > 0, x))

    sums = kernels.sums(case.dy, x, bits, split, frozen, stats)
    want = phases.sums(in_float64(case.dy), in_float64(x), bits, split, in_float64(frozen), in_float64(stats))
    magnitude = Wing(running_mean=-in_float64(frozen.running_mean).abs())
    size = phases.sums(in_float64(case.dy).abs(), in_float64(x).abs(), bits, split, magnitude, -in_float64(stats).abs())
    close(sums, want, size)

    means = sums[2:] / max(count, 1)
    arguments = (split, frozen, adaptive, stats, means)
    got = kernels.apply_backward(case.dy, x, bits, *arguments, EPS, [True, True])
    arguments = (split, *(in_float64(t) for t in arguments[1:]))
    want = phases.apply_backward(in_float64(case.dy), in_float64(x), bits, *arguments, EPS, [True, True])
    slope = ((x.double().abs() + 4) * (stats[1].double().square() * means[1].double().abs())[:, None, None]).abs()
    inner = case.dy.double().abs() + means[0].double().abs()[:, None, None] + slope
    size = inner * scale.double().abs()[:, :, None, None]
    close(got[0], want[0], size, of_image=True)
    close(got[1], want[1], 0 * size)  # no arithmetic
    arguments = (split, frozen, adaptive, stats, means)
    neither = kernels.apply_backward(case.dy, x, bits, *arguments, EPS, [False, False])
    assert [t.numel() for t in neither] == [0, 0]
