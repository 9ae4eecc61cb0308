"""The float64 oracle accepts what is right, and notices what is not."""

import copy
import math

import pytest
import torch

from tests.ops.cases import DTYPES, FORMATS, MOMENTUM, Case
from twins_fast.ops import backend, native, oracle

compiled = pytest.mark.skipif(native._C is None, reason="no compiled module")
BACKENDS = ["torch", pytest.param("cpp", marks=compiled)]
SHAPE, SPLIT = (6, 5, 7, 9), 3


def a_case(dtype=torch.float32, memory_format=FORMATS[1], residual=True, split=SPLIT, shape=SHAPE):
    return Case(shape, split, dtype, memory_format, residual, True)


def run(case, name="torch"):
    with backend.use_backend(name):
        return case.run()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_bounds_of_right_results_are_near(residual, memory_format, name):
    case = a_case(memory_format=memory_format, residual=residual, shape=(16, 32, 9, 9), split=8)
    errors = case.errors(run(case, name), name)
    assert ("dresidual" in errors) == residual and errors.pop("dresidual", 0.0) == 0.0
    assert set(errors) == set(oracle.Results._fields) - {"dresidual", "frozen_mean", "frozen_var"}
    assert all(0.003 < error <= 1 for error in errors.values()), errors


@compiled
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_rounded_once(dtype):
    case = a_case(dtype)
    errors = case.errors(run(case, "cpp"), "cpp")
    assert 0.9 < errors["y"] <= 1 and 0.9 < errors["dx"] <= 1
    normalised = copy.copy(case)
    normalised.residual, normalised.relu = None, False
    twice = (run(normalised, "cpp").y.float() + case.residual.float()).relu().to(dtype)
    results = run(case, "cpp")._replace(y=twice)
    assert case.errors(results, "cpp")["y"] > 1 >= case.errors(results, "torch")["y"]


def test_channels_are_checked_in_parts(monkeypatch):
    case = a_case()
    results = run(case)
    whole = case.errors(results, "torch")
    monkeypatch.setattr(oracle, "AT_ONCE", 2 * SHAPE[0] * SHAPE[2] * SHAPE[3])
    assert case.errors(results, "torch") == pytest.approx(whole, rel=1e-6)
    results.y[5, 4, 6, 8] += 1
    assert case.errors(results, "torch")["y"] > 1


def test_long_sums_are_those_of_more_than_a_chain():
    case = a_case(shape=(8, 5, 24, 24), split=4)
    call = oracle.Call(case.x, case.residual, case.dy, 4, case.frozen, case.adaptive, MOMENTUM, 1e-5, True)
    results = run(case)
    short, long = oracle.errors(call, results), oracle.errors(call, results, long_sums=True)
    assert all(long[name] <= short[name] <= 1 for name in short) and long["running_mean"] < short["running_mean"]
    assert long["dfrozen_bias"] == short["dfrozen_bias"]  # the root of the sum of squares counts anyway


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mean_of_zero_is_no_exact_mean(name):
    """Errors of a mean do not shrink with it, and nothing else covers them here."""
    case = Case((8, 16, 24, 24), 0, torch.float32, FORMATS[1], False, False)
    case.x -= case.x.mean((0, 2, 3), keepdim=True)
    case.adaptive[3].zero_()
    case.check(run(case, name), name)


def test_either_sign_of_a_result_near_zero_is_right():
    case = a_case(residual=False)
    at = (1, 2, 3, 4)
    case.x[at] = case.frozen[0][2] = 1  # so that the bias is what remains of larger terms
    case.frozen[3][2] = 1e-7
    passing = run(case)
    assert passing.y[at] > 0 and passing.dx[at] != 0
    case.check(passing, "torch")
    case.frozen[3][2] = -1e-7
    stopping = run(case)
    assert stopping.y[at] == 0 and stopping.dx[at] == 0
    case.check(stopping, "torch")
    case.check(passing, "torch")
    # But the gradient has to be that of the y at hand.
    assert case.errors(stopping._replace(y=passing.y), "torch")["dx"] > 1


def biased_variance(case, results):
    new = case.x[SPLIT:].var((0, 2, 3), correction=0)
    return results._replace(running_var=case.adaptive[1].lerp(new, MOMENTUM))


def other_wing(case, results):
    case = copy.copy(case)
    case.split += 1
    y = results.y.clone()
    y[SPLIT] = run(case).y[SPLIT]
    return results._replace(y=y)


def flipped_mask(case, results):
    case = copy.copy(case)
    case.dy = case.dy.clone()
    case.dy[tuple((results.y > 0.5).nonzero()[7])] = 0
    return run(case)


def weight_off(case, results):
    return results._replace(dweight=results.dweight * (1 + 1e-4))


def frozen_weight_off(case, results):
    return results._replace(dfrozen_weight=results.dfrozen_weight * (1 - 1e-4))


def units_off(case, results):
    y = results.y.clone()
    y.view(torch.int32)[y == y.max()] += 64
    return results._replace(y=y)


def not_a_number(case, results):
    y = results.y.clone()
    y[2, 3, 4, 5] = torch.nan
    return results._replace(y=y)


def infinite(case, results):
    return results._replace(dx=results.dx + torch.inf)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (biased_variance, {"running_var"}),
        (other_wing, {"y"}),
        (flipped_mask, {"dx", "dresidual"}),
        (weight_off, {"dweight"}),
        (frozen_weight_off, {"dfrozen_weight"}),
        (units_off, {"y"}),
        (not_a_number, {"y"}),
        (infinite, {"dx"}),
    ],
)
def test_faults_are_noticed(fault, wrong, name):
    case = a_case()
    results = run(case, name)
    case.check(results, name)
    errors = case.errors(fault(case, results), name)
    assert {result for result, error in errors.items() if not error <= 1} >= wrong, errors
    if fault in (not_a_number, infinite):
        assert errors[min(wrong)] == math.inf


@pytest.mark.parametrize("name", BACKENDS)
def test_faults_of_a_first_half_that_is_adaptive_too_are_noticed(name):
    case = a_case()
    frozen = run(case, name)
    case.both_adaptive = True
    results = run(case, name)
    case.check(results, name)
    assert case.errors(results._replace(frozen_var=results.frozen_var * (1 + 1e-4)), name)["frozen_var"] > 1
    taken_for_frozen = frozen._replace(frozen_mean=results.frozen_mean, frozen_var=results.frozen_var)
    errors = case.errors(taken_for_frozen, name)
    assert min(errors[name] for name in ("y", "dx", "dfrozen_weight")) > 1 >= errors["dweight"]


@pytest.mark.parametrize("split", [0, SHAPE[0]])
def test_what_needs_no_arithmetic_is_exact(split):
    case = a_case(split=split)
    results = run(case)
    untouched = (
        ["dfrozen_weight", "dfrozen_bias"] if split == 0 else ["dweight", "dbias", "running_mean", "running_var"]
    )
    for name in ["dresidual", *untouched]:
        changed = getattr(results, name).clone()
        changed[(0,) * changed.dim()] += 1e-6
        assert case.errors(results._replace(**{name: changed}), "torch")[name] > 1


def test_results_of_another_kind_are_refused():
    case = a_case()
    results = run(case)
    for changes, message in (
        ({"y": results.y.double()}, r"y must be torch.float32 \(6, 5, 7, 9\), got torch.float64"),
        ({"dx": results.dx.bfloat16()}, "dx must be torch.float32"),
        ({"dweight": results.dweight[:4]}, r"dweight must be torch.float32 \(5,\), got torch.float32 \(4,\)"),
        ({"running_var": None}, "running_var is missing"),
        ({"dresidual": None}, "dresidual is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            case.errors(results._replace(**changes), "torch")
    with pytest.raises(ValueError, match="frozen_mean must be None unless both are adaptive"):
        case.errors(results._replace(frozen_mean=results.running_mean), "torch")
    case.residual = None
    with pytest.raises(ValueError, match="dresidual must be None"):
        case.errors(results, "torch")
    case.x = case.x.double()
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.float64"):
        case.errors(results, "torch")
