"""Figures by matplotlib, as PNG files."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trace_sdk.atomic import write_bytes
from trace_sdk.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need_matplotlib() -> None:
    """Raises MissingExtraError, before hours of work rather than after, if figures cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("Plots need matplotlib. Run: pip install matplotlib, or leave --plot out.")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, without a window. Raises MissingExtraError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure_png(figure: Figure, dpi: int) -> bytes:
    """The file's bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def save_figure(figure: Figure, out: Path, dpi: int) -> None:
    """Write a figure, whole or not at all. Raises OutputError."""
    write_bytes(out, figure_png(figure, dpi))
