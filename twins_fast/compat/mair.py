"""The trainers of MAIR (https://github.com/Harry24k/MAIR): their inner attack, by one call."""

from __future__ import annotations

from typing import Any

import torch

from twins_fast.compat import torchattacks

_KINDS = {"PGD": torchattacks.PGD, "TPGD": torchattacks.TPGD, "FGSM": torchattacks.FGSM, "FFGSM": torchattacks.FFGSM}


def accelerate(trainer: Any, amp_dtype: torch.dtype | None = None, engine: str = "auto") -> Any:
    """Let a trainer (``AT``, ``TRADES``, ``MART``, ...) attack by this package.

    Args:
        trainer: whose ``atk`` is a PGD, TPGD, FGSM or FFGSM; changed in place and returned.
        amp_dtype, engine: of :class:`twins_fast.PGD`.

    Raises:
        TypeError: a trainer without an attack.
        NotImplementedError: another attack.
    """
    theirs = getattr(trainer, "atk", None)
    if theirs is None:
        raise TypeError(f"{type(trainer).__name__} has no attack: atk is missing")
    name = type(theirs).__name__
    if name not in _KINDS:
        raise NotImplementedError(f"atk={name}: only {', '.join(_KINDS)}; give it twins_fast.accelerate(model) instead")
    options = {key: getattr(theirs, key) for key in ("eps", "alpha", "steps", "random_start") if hasattr(theirs, key)}
    ours = _KINDS[name](theirs.model, **options, engine=engine, amp_dtype=amp_dtype)
    ours.device = theirs.device
    if theirs.normalization_used is not None:
        ours.set_normalization_used(*(theirs.normalization_used[key].flatten().tolist() for key in ("mean", "std")))
    for key in ("attack_mode", "targeted", "_target_map_function"):  # which asks theirs where it has to
        setattr(ours, key, getattr(theirs, key))
    ours.set_model_training_mode(
        *(getattr(theirs, f"_{part}_training", False) for part in ("model", "batchnorm", "dropout"))
    )
    trainer.atk = ours
    return trainer
