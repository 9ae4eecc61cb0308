"""Checkpoints: reading those of others without running them, loading into a network, saving that survives a kill."""

from twins_fast.checkpoints.convert import WINGS, convert_checkpoint
from twins_fast.checkpoints.load import adopt_source_head, load_pretrained, load_state
from twins_fast.checkpoints.names import CheckpointError
from twins_fast.checkpoints.read import load_checkpoint, read_meta, read_state_dict
from twins_fast.checkpoints.write import save_checkpoint, write_atomically

__all__ = [
    "WINGS",
    "CheckpointError",
    "adopt_source_head",
    "convert_checkpoint",
    "load_checkpoint",
    "load_pretrained",
    "load_state",
    "read_meta",
    "read_state_dict",
    "save_checkpoint",
    "write_atomically",
]
