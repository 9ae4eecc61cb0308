"""Recipes in files that version 0.1 wrote: one flat table of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twins_fast.methods import METHODS

_SECTION = {
    "data": ("dataset", "classes", "augmentation", "batch_size", "workers"),
    "network": ("arch", "checkpoint", "upsample", "channels_last"),
    "attack": ("norm", "eps", "alpha", "steps", "engine"),
    "optimizer": ("epochs", "lr", "momentum", "weight_decay", "schedule", "milestones", "lr_gamma", "warmup"),
    "evaluation": ("eval_alpha", "eval_steps", "eval_images", "eval_every", "eval_before"),
    "run": ("seed", "amp", "beside"),
}
_NEW_NAME = {"lr_gamma": "gamma", "beside": "baselines"}
_METHOD_OPTIONS = {"frozen_weight": "twins_lambda", "beta": "trades_beta", "adversary": "adversary"}  # new -> old


def is_flat(tables: Mapping[str, Any]) -> bool:
    """Whether a recipe is in the flat form."""
    return "dataset" in tables and not set(_SECTION) & set(tables)


def from_flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form; fields that version 0.1 did not have stay where they are, to be refused."""
    rest = dict(fields)
    tables: dict[str, Any] = {"name": rest.pop("name", "unnamed")}
    for section, names in _SECTION.items():
        tables[section] = {
            _NEW_NAME.get(name, name.removeprefix("eval_")): rest.pop(name) for name in names if name in rest
        }
    if tables["run"].get("amp", "none") is None:
        tables["run"]["amp"] = "none"
    if tables["network"].get("checkpoint", "") is None:
        tables["network"]["checkpoint"] = "none"
    tables["evaluation"]["choose_on"] = "test"
    method = rest.pop("method", "twins-at")
    tables["method"] = {"name": method}
    for new, old in _METHOD_OPTIONS.items():  # every recipe had all of them, whatever its method
        value = rest.pop(old, None)
        if value is not None and hasattr(METHODS.get(method), new):
            tables["method"][new] = "ce" if value == "published" else value
    return tables | rest
