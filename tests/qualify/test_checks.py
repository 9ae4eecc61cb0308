"""What the checks find: a CPU stands in for the device."""

import subprocess
import sys

import pytest
import torch

from bench.header import ROOT
from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.ops import native
from twins_fast.qualify import checks
from twins_fast.verdicts import FAILED, PASSED, SLOWER, UNKNOWN

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(native._C is None, reason="needs the C++ kernels")


@pytest.fixture
def found(monkeypatch):
    """Few cases; subject -> what was reported."""
    monkeypatch.setattr(checks, "SHAPES", [(3, 3, 7, 1), (4, 31, 7, 7)])
    monkeypatch.setattr(checks, "FULL", (4, 16, 8, 8))
    monkeypatch.setattr(checks, "TIMED", [(2, 8, 4, 4), (4, 16, 8, 8)])
    monkeypatch.setattr(checks, "DTYPES", (torch.bfloat16, torch.float32))
    return {}


def look(found, check):
    checks.CHECKS[check](CPU, lambda subject, **result: found.update({subject: result}))
    return [result["outcome"] for result in found.values()]


def fast(monkeypatch, gain):
    times = iter([1.0, gain] * 100)
    monkeypatch.setattr(checks, "seconds", lambda *_: next(times))
    monkeypatch.setattr(checks, "wall_seconds", lambda *_: next(times))


@needs_kernels
@pytest.mark.parametrize("check", ["twin_batch_norm cpp", "plan"])
def test_right_and_fast_kernels_pass(found, check, monkeypatch):
    fast(monkeypatch, 1.1)
    assert look(found, check) == [PASSED, PASSED]


@needs_kernels
@pytest.mark.parametrize("check", ["twin_batch_norm cpp", "plan"])
def test_right_and_slow_kernels_are_slower(found, check, monkeypatch):
    fast(monkeypatch, 1.04)
    assert look(found, check) == [SLOWER, SLOWER]
    assert all(result["reason"] == "1.04 times the speed of plain PyTorch" for result in found.values())


@needs_kernels
def test_kernels_that_are_faster_from_some_size_on(found, monkeypatch):
    times = iter([1.0, 0.5, 1.0, 2.0] * 2)
    monkeypatch.setattr(checks, "seconds", lambda *_: next(times))
    assert look(found, "twin_batch_norm cpp") == [PASSED, PASSED]
    assert [result["smallest"] for result in found.values()] == [4 * 16 * 64] * 2


def spoilt(name, change):
    real = getattr(native, name)

    def call(*arguments):
        results = list(real(*arguments))
        change(results)
        return tuple(results)

    return call


def later_calls_differ():
    calls = []
    return lambda results: calls.append(1) or (len(calls) % 100 > 20 and results[0][-1].add_(1e-6 * len(calls)))


@needs_kernels
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("forward", lambda results: results[0].mul_(1.02), "y of (3, 3, 7, 1), contiguous, split 1 is off by"),
        ("forward", lambda results: results[0][-1].nan_to_num_(0), "NaN elsewhere"),
        ("backward", lambda results: results[0][-1].mul_(1.5), "dx of"),
    ],
)
def test_wrong_kernels_fail(found, monkeypatch, name, change, said):
    monkeypatch.setattr(native, name, spoilt(name, change))
    assert look(found, "twin_batch_norm cpp") == [FAILED, FAILED]
    assert all(said in result["reason"] for result in found.values())


def test_a_kernel_that_writes_nothing_fails(found, monkeypatch):
    from twins_fast.attacks.engine import cache

    lazy = type("Lazy", (TorchExecutor,), {"name": "lazy", "conv": lambda *_: lambda: None})
    monkeypatch.setattr(cache, "executor_for", lazy)
    assert look(found, "plan") == [FAILED, FAILED]
    assert all("0: conv by lazy gives other results" in result["reason"] for result in found.values())


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), UNKNOWN, "memory ran out: CUDA out of memory"),
        (KeyError("odd"), FAILED, "KeyError: 'odd'"),
    ],
)
def test_errors_are_outcomes(found, monkeypatch, error, outcome, reason):
    def fails(*_):
        raise error

    monkeypatch.setattr(checks, "_two_wing_batch_norm", fails)
    assert look(found, "twin_batch_norm cpp") == [outcome] * 2
    assert {result["reason"] for result in found.values()} == {reason}


def test_what_is_not_installed_does_not_pass(found, monkeypatch):
    monkeypatch.setattr(checks.backend, "_obstacle", lambda *_: "Triton is not installed")
    assert look(found, "twin_batch_norm triton") == [FAILED, FAILED]
    assert all("Triton is not installed" in result["reason"] for result in found.values())


def test_after_an_error_of_cuda_nothing_more_is_tried(found, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checks, "_two_wing_batch_norm", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        look(found, "twin_batch_norm cpp")
    assert [result["outcome"] for result in found.values()] == [FAILED]


def test_a_check_of_a_device_that_is_gone():
    command = [sys.executable, "-m", "twins_fast.qualify", "plan", "GPU-gone"]
    gone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert gone.returncode == 2 and gone.stdout == "no CUDA device GPU-gone here\n"
