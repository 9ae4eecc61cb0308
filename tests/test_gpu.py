"""What only a CUDA device can show: graph capture, streams, another device, more than 2^31 values."""

import pytest
import torch
from two_wing import EPS, FORMATS, MOMENTUM, Case

from twins_fast import backend, compiled, ops, reference

with_cuda = pytest.mark.skipif(not getattr(compiled._C, "has_cuda", False), reason="built without nvcc")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("name", [pytest.param("cuda", marks=with_cuda), "triton"]),
]


def a_case(memory_format=torch.channels_last, device="cuda", seed=0):
    return Case((16, 64, 28, 28), 8, torch.bfloat16, memory_format, True, True, device, seed)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_graph_capture(name, memory_format):
    case, other = a_case(memory_format), a_case(memory_format, seed=1)
    x, residual = case.x.clone().requires_grad_(), case.residual.clone().requires_grad_()
    adaptive = [t.clone() for t in case.adaptive]

    def step():
        y = ops.twin_batch_norm(x, 8, case.frozen, adaptive, MOMENTUM, EPS, residual, True)
        return y, *torch.autograd.grad(y, (x, residual), case.dy)

    with backend.use_backend(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for inputs in (other, case):  # each replay sees new inputs and updates the running statistics once more
            with torch.no_grad():
                x.copy_(inputs.x), residual.copy_(inputs.residual)
            before = [t.clone() for t in adaptive[:2]]
            graph.replay()
            want_x, want_residual = inputs.x.clone().requires_grad_(), inputs.residual.clone().requires_grad_()
            wing = [*before, *case.adaptive[2:]]
            y = ops.twin_batch_norm(want_x, 8, case.frozen, wing, MOMENTUM, EPS, want_residual, True)
            want = (y, *torch.autograd.grad(y, (want_x, want_residual), case.dy))
            assert all(torch.equal(a, b) for a, b in zip((*results, *adaptive[:2]), (*want, *wing[:2]), strict=True))


def test_side_stream(name):
    case = a_case()
    with backend.use_backend(name):
        want = case.run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # what runs on another stream would overtake
            case.x.mul_(2)
            got = case.run()
        stream.synchronize()
        case.x.div_(2)
    case.x.mul_(2)
    case.check(got, name)
    assert not torch.equal(got[0], want[0])


def test_many_streams_at_once(name):
    """Cooperative launches of several streams share the device."""
    cases = [a_case(seed=seed) for seed in range(8)]
    with backend.use_backend(name):
        want = [case.run() for case in cases]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        got = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(case.run())
        torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(t, u) for t, u in zip(a, b, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(name):
    with backend.use_backend(name):
        case = a_case(device="cuda:1")
        assert torch.cuda.current_device() == 0
        case.check(case.run(), name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_than_2_to_the_31_values(name, memory_format):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    images, channels, side = 2**14 + 6, 64, 46  # 2.2e9 values
    x = torch.empty((images, channels, side, side), dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    x.normal_()
    zeros, ones = (lambda: torch.zeros(channels, device="cuda")), (lambda: torch.ones(channels, device="cuda"))
    wings = [[zeros(), ones(), ones(), None] for _ in range(2)]
    split = images - 4
    with backend.use_backend(name):
        y = ops.twin_batch_norm(x, split, *wings, MOMENTUM, EPS, relu=True)
    # The first rows, and those about the border between the wings, at the very end.
    for rows in (slice(0, 2), slice(split - 2, None)):
        fresh = [[None if t is None else t.clone() for t in wing] for wing in wings]
        want = reference.twin_batch_norm(x[rows].float(), 2, *fresh, MOMENTUM, EPS, relu=True)
        torch.testing.assert_close(y[rows].float(), want, rtol=2**-7, atol=2**-7)
