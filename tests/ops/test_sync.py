"""Batch statistics over two processes (gloo) against one batch that holds the rows of both."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.two_processes import run_two
from twins_fast import (
    TwinBatchNorm2d,
    convert_sync_twin_bn,
    convert_twin_bn,
    fuse_twin_bn,
    fusion_report,
    ops,
    revert_twin_bn,
    wings,
)
from twins_fast.models import CifarResNet
from twins_fast.nn import TwinBatchNormAct2d
from twins_fast.ops import backend, native, oracle

KERNELS = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64)]
if native._C is not None:
    KERNELS += [("cpp", torch.float32), ("cpp", torch.bfloat16)]
LAYERS = {"plain": {}, "cumulative": {"momentum": None}, "untracked": {"track_running_stats": False}}
CASES = {  # rows and split of each process
    "equal": ((4, 2), (4, 2)),
    "unequal": ((5, 2), (3, 1)),
    "nothing adaptive in one": ((3, 1), (2, 2)),
    "one row each": ((1, 0), (1, 0)),
    "all adaptive": ((2, 0), (3, 0)),
}


# What both the processes and the tests make, from the same seeds.


def arguments(case, dtype, rank):
    """x, residual, dy of one process, and both wings."""
    generator = torch.Generator().manual_seed(10 * rank + 1)
    rows = CASES[case][rank][0]
    images = [torch.randn(rows, 3, 2, 3, generator=generator).to(dtype) + rank for _ in range(3)]
    generator.manual_seed(5)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    wings = [[torch.rand(3, generator=generator).to(compute_dtype) + 0.5 for _ in range(4)] for _ in range(2)]
    return *images, *wings


def run_op(x, split, residual, dy, frozen, adaptive, relu, group, both_adaptive=False):
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    leaves = [v.requires_grad_() for wing in (frozen, adaptive) for v in wing[2:] if v is not None]
    y = ops.twin_batch_norm(x, split, frozen, adaptive, 0.3, 1e-5, residual, relu, group, both_adaptive)
    grads = torch.autograd.grad(y, [x, residual, *leaves], dy, allow_unused=True)
    statistics = [*adaptive[:2], *(frozen[:2] if both_adaptive else ())]
    zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, [x, residual, *leaves], strict=True)]
    return {"images": [y.detach(), *zeros[:2]], "sums": zeros[2:], "statistics": [v.detach() for v in statistics]}


def network():
    torch.manual_seed(0)
    model = convert_twin_bn(CifarResNet(3, width=8, blocks=(1, 1)))
    return model.double()


def images_of(rank):
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).double()


# What the processes do: every function returns something to compare, or asserts.


def ops_of_all_cases(rank):
    returned = {}
    for (name, dtype), case, relu, both in itertools.product(KERNELS, CASES, (False, True), (False, True)):
        x, residual, dy, frozen, adaptive = arguments(case, dtype, rank)
        with backend.use_backend(name):
            result = run_op(x, CASES[case][rank][1], residual, dy, frozen, adaptive, relu, "world", both)
        returned[name, case, dtype, relu, both] = result
    return returned


def ops_without_a_frozen_wing(rank):
    returned = {}
    for name, dtype in KERNELS:
        x, residual, dy, _, adaptive = arguments("all adaptive", dtype, rank)
        with backend.use_backend(name):
            returned[name, dtype] = run_op(x, 0, residual, dy, (None,) * 4, adaptive, True, "world")
    return returned


def layers(rank):
    returned = {}
    for name, options in LAYERS.items():
        layer = TwinBatchNorm2d(3, **options, process_group=dist.group.WORLD)
        for _ in range(2):
            x, residual, *_ = arguments("unequal", torch.float32, rank)
            layer(x, residual, relu=True)
        returned[name] = layer.state_dict()
    return returned


def half_precision_buffers(rank):
    x, residual, dy, frozen, adaptive = arguments("unequal", torch.bfloat16, rank)
    frozen, adaptive = ([v.bfloat16() for v in wing] for wing in (frozen, adaptive))
    return run_op(x, 2 - rank, residual, dy, frozen, adaptive, True, "world")


def fewer_than_two_values(rank):
    layer = TwinBatchNorm2d(3, process_group="world")
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 3, 1, 1)
    with wings(layer, "adaptive"), pytest.raises(ValueError, match="not be empty"):
        layer(x[:0])
    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    frozen, wing = ([torch.zeros(3), torch.ones(3), None, None] for _ in range(2))
    with pytest.raises(ValueError, match="at least 2 values per channel in all processes, got 1"):
        ops.twin_batch_norm(x, rank, frozen, wing, 0.1, 1e-5, process_group="world")
    with pytest.raises(ValueError, match="at least 2 values per channel in all processes, got 1"):
        ops.twin_batch_norm(torch.randn(2, 3, 1, 1), 1 + rank, wing, frozen, 0.1, 1e-5, None, False, "world", True)
    assert torch.equal(wing[0], torch.zeros(3)) and torch.equal(wing[1], torch.ones(3))
    y = ops.twin_batch_norm(x, 1, frozen, wing, 0.1, 1e-5, process_group="world")  # nobody has adaptive rows
    torch.testing.assert_close(y, F.batch_norm(x, *frozen))
    weight = torch.ones(3, requires_grad=True)
    ops.twin_batch_norm(x, 1, frozen, [*wing[:2], weight, None], 0.1, 0.0, process_group="world").sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3))  # without an eps, too
    assert torch.equal(wing[0], torch.zeros(3)) and torch.equal(wing[1], torch.ones(3))


def different_needs(rank):
    """One process wants gradients of x only, the other of the weight only."""
    x, _, dy, frozen, adaptive = arguments("equal", torch.float64, rank)
    leaf = (x if rank == 0 else adaptive[2]).requires_grad_()
    y = ops.twin_batch_norm(x, 2, frozen, adaptive, 0.3, 1e-5, process_group="world")
    return torch.autograd.grad(y, leaf, dy)[0]


def groups(rank):
    both, first = dist.new_group([0, 1]), dist.new_group([0])
    layer = TwinBatchNorm2d(3, process_group=both)
    assert copy.deepcopy(layer).process_group is both
    assert copy.deepcopy(nn.Sequential(layer))[0].process_group is both
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=both))
    assert convert_twin_bn(model)[0].process_group is both
    assert revert_twin_bn(model)[0].process_group is both
    assert convert_sync_twin_bn(layer, both).process_group is both
    layer(torch.randn(2, 3, 2, 2))

    alone = TwinBatchNorm2d(3, process_group=first)
    x = torch.randn(4, 3, 2, 2)
    if rank == 0:  # one process: the ordinary op
        local = TwinBatchNorm2d(3)
        assert torch.equal(alone(x), local(x)) and torch.equal(alone.running_var, local.running_var)
    else:
        with pytest.raises(ValueError, match="does not hold this process"):
            alone(x)


def without_collectives(rank):
    """Evaluation and the frozen wing wait for no one."""
    layer = TwinBatchNorm2d(3, process_group="world")
    if rank == 0:
        layer.eval()(torch.randn(2, 3, 2, 2))
        with wings(layer.train(), "frozen"):
            layer(torch.randn(2, 3, 2, 2), relu=True)


def data_parallel(rank):
    returned = {}
    for fused in (False, True):
        model = convert_sync_twin_bn(network())
        if fused:
            fuse_twin_bn(model)
            assert sum(bool(row.fused) for row in fusion_report(model)) == 5
        parallel = DistributedDataParallel(model)
        (parallel(images_of(rank)) ** 2).mean().backward()
        returned[fused] = {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())
    return returned


JOBS = [
    ops_of_all_cases,
    ops_without_a_frozen_wing,
    layers,
    half_precision_buffers,
    fewer_than_two_values,
    different_needs,
    groups,
    without_collectives,
    data_parallel,
]


def one_raises(rank):
    """A process that fails by itself says why; the other one does not wait forever."""
    x = torch.randn(2 - 2 * rank, 3, 2, 2)
    try:
        TwinBatchNorm2d(3, process_group="world")(x)
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    first, second = run_two(JOBS, tmp_path_factory.mktemp("two"))
    return {name: (first[name], second[name]) for name in first}


def union(tensors, splits):
    """[frozen rows of both | adaptive rows of both]."""
    return torch.cat(
        [t[:split] for t, split in zip(tensors, splits, strict=True)]
        + [t[split:] for t, split in zip(tensors, splits, strict=True)]
    )


@pytest.mark.parametrize("both_adaptive", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_equal_to_one_batch(both, name, case, dtype, relu, both_adaptive):
    got = [each[name, case, dtype, relu, both_adaptive] for each in both["ops_of_all_cases"]]
    splits = [split for _, split in CASES[case]]
    first, second = (arguments(case, dtype, rank) for rank in range(2))
    x, residual, dy = (union(pair, splits) for pair in zip(first[:3], second[:3], strict=True))
    images = [union(pair, splits) for pair in zip(*(each["images"] for each in got), strict=True)]
    sums = [a + b for a, b in zip(*(each["sums"] for each in got), strict=True)]
    statistics = got[0]["statistics"]
    assert all(torch.equal(a, b) for a, b in zip(statistics, got[1]["statistics"], strict=True))
    if dtype == torch.float64:
        want = run_op(x, sum(splits), residual, dy, *first[3:], relu, None, both_adaptive)
        torch.testing.assert_close([*images, *sums, *statistics], sum(want.values(), []), rtol=1e-12, atol=1e-12)
        return
    call = oracle.Call(x, residual, dy, sum(splits), *first[3:], 0.3, 1e-5, relu, both_adaptive)
    errors = oracle.errors(call, oracle.Results(*images, *sums, *statistics))
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_no_frozen_wing(both, name, dtype):
    for without, having in zip(both["ops_without_a_frozen_wing"], both["ops_of_all_cases"], strict=True):
        got, want = without[name, dtype], having[name, "all adaptive", dtype, True, False]
        for a, b in zip(sum(got.values(), []), want["images"] + want["sums"][2:] + want["statistics"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_running_statistics_of_a_layer(both, name):
    first, second = (each[name] for each in both["layers"])
    parts = [arguments("unequal", torch.float32, rank) for rank in range(2)]
    x = union([part[0] for part in parts], [2, 1])
    local = TwinBatchNorm2d(3, **LAYERS[name])
    with wings(local, "adaptive"):
        for _ in range(2):
            local(x[3:])
    for entry, want in local.state_dict().items():
        assert torch.equal(first[entry], second[entry])
        if not entry.startswith("main_bn"):
            torch.testing.assert_close(first[entry], want)


def test_half_precision_buffers_are_updated_in_place(both):
    first, second = both["half_precision_buffers"]
    exact = both["ops_of_all_cases"][0]["torch", "unequal", torch.bfloat16, True, False]
    for got, other, want in zip(first["statistics"], second["statistics"], exact["statistics"], strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, other)
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


def test_every_process_helps_the_others_backward(both):
    parts = [arguments("equal", torch.float64, rank) for rank in range(2)]
    x, dy = (union([part[i] for part in parts], [2, 2]) for i in (0, 2))
    frozen, adaptive = parts[0][3:]
    x.requires_grad_()
    ops.twin_batch_norm(x, 4, frozen, adaptive, 0.3, 1e-5).backward(dy)
    torch.testing.assert_close(both["different_needs"][0], x.grad[[0, 1, 4, 5]])


@pytest.mark.parametrize("fused", [False, True])
def test_data_parallel_training_is_training_on_one_batch(both, fused):
    model = network()
    x = union([images_of(0), images_of(1)], [2, 2])
    (model(x) ** 2).mean().backward()
    for gradients, buffers in (each[fused] for each in both["data_parallel"]):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, msg=name)


def test_one_process_that_raises(tmp_path):
    first, second = (each["one_raises"] for each in run_two([one_raises], tmp_path, may_break=True))
    assert second == ("ValueError", "x must not be empty, got shape (0, 3, 2, 2)")
    assert first[0] == "ProcessLost"


# In one process, without torch.distributed.


def test_without_torch_distributed():
    layer, x = TwinBatchNorm2d(3, process_group="world"), torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        layer(x)
    assert layer.num_batches_tracked == 0 and layer.main_bn.num_batches_tracked == 0
    layer.eval()(x)


def test_something_else_than_a_group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="process_group must be .* got 'all'"):
            TwinBatchNorm2d(3, process_group="all")(torch.randn(4, 3, 2, 2))
    finally:
        dist.destroy_process_group()


def test_conversion_to_and_from_synchronised_layers():
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
    convert_twin_bn(model)
    with pytest.raises(ValueError, match="no two-wing"):
        convert_sync_twin_bn(nn.ReLU())
    assert convert_sync_twin_bn(model) is model
    assert model[0].process_group == model[1].process_group == "world" and "synchronised" in repr(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].process_group == "world"
    weight = model[0].weight
    assert [type(layer) for layer in revert_twin_bn(model)] == [nn.SyncBatchNorm, SyncBatchNormAct]
    assert model[0].weight is weight and model[0].process_group is None
    convert_twin_bn(model)
    assert [type(layer) for layer in model] == [TwinBatchNorm2d, TwinBatchNormAct2d]
    assert model[0].process_group == model[1].process_group == "world"
    for layer in model:
        layer.process_group = None
    assert [type(layer) for layer in revert_twin_bn(model)] == [nn.BatchNorm2d, BatchNormAct2d]
