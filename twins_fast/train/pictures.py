"""How a picture is begun and written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from twins_fast.checkpoints import write_atomically

FORMATS = (".png", ".svg")


def pyplot() -> Any:
    """Matplotlib's, without a screen."""
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, target: str | Path) -> None:
    """Write and close a figure, as SVG if the name ends so, and as PNG otherwise."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="svg" if Path(target).suffix.lower() == ".svg" else "png")
    pyplot().close(figure)
    write_atomically(target, picture.getvalue())
