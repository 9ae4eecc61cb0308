"""What is said of a device."""

import warnings

import pytest
import torch

from twins_fast import PGD, devices


@pytest.fixture(autouse=True)
def forgotten():
    devices._warn_if_slow.cache_clear()
    yield
    devices._warn_if_slow.cache_clear()


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_cpu_without_the_instructions_is_named_once(dtype, name, tiny_model, batch, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    attack = PGD(tiny_model.eval(), steps=1, amp_dtype=dtype, engine="eager")
    with pytest.warns(UserWarning, match=f"no instructions for {dtype}.*amp_dtype=None") as said:
        attack(*batch)
        attack(*batch)
    assert len(said) == 1


@pytest.mark.parametrize("dtype, supported", [(None, False), (torch.bfloat16, True)])
def test_others_are_not(dtype, supported, tiny_model, batch, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(tiny_model.eval(), steps=1, amp_dtype=dtype, engine="eager")(*batch)


def test_nothing_is_asked_without_the_library_that_would_know(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    devices._warn_if_slow(torch.bfloat16)
