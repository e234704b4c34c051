"""Pictures as files: how every one of them begins and ends. Needs matplotlib, which the `plot` extra brings."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int) -> "Figure":
    """A figure in inches of its own, not pyplot's: nothing global changes, and no display is needed.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=dpi, facecolor="white")


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
