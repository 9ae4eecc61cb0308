"""Names of entries: prefixes of wrappers, entries that are no part of the network."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints.helpers import FORMATS, Body, TwoWing, assert_same, save
from twins_fast.checkpoints import CheckpointError, read_state_dict, save_checkpoint


@FORMATS
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "attacker.model.", "_orig_mod.module."])
def test_reads_a_bare_two_wing_state_dict(tmp_path, zipped, prefix):
    state = Body(TwoWing, own_statistics=True).state_dict()
    assert_same(read_state_dict(save(tmp_path, {prefix + k: v for k, v in state.items()}, zipped)), state)


def test_reads_the_network_out_of_a_training_checkpoint(tmp_path):
    state = Body(TwoWing).state_dict()
    tensors = {f"model.{k}": v for k, v in state.items()} | {f"momentum.{k}": v for k, v in state.items()}
    save_checkpoint(tmp_path / "last.safetensors", tensors, {})
    assert_same(read_state_dict(tmp_path / "last.safetensors"), state)


def test_names_that_clash(tmp_path):
    with pytest.raises(CheckpointError, match="two entries are named a"):
        read_state_dict(save(tmp_path, {"a": torch.ones(1), "module.a": torch.ones(1)}))
