"""The logits among what a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Output = int | str | Callable[[Any], Any] | None  # index, key or function; None: it is the logits themselves


def output_of(returned: Any, output: Output) -> Any:
    """What ``output`` names in ``returned``.

    Raises:
        TypeError: there is no such thing in it.
    """
    if output is None:
        return returned
    if callable(output):
        return output(returned)
    try:
        return returned[output]
    except (KeyError, IndexError, TypeError) as error:
        raise TypeError(f"output={output!r} is not in the {type(returned).__name__} that the model returns") from error
