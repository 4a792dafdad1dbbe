"""A map too large for one piece: overlapping windows, and their answers blended without a seam."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import ArgumentError


class Window(NamedTuple):
    """A rectangle of a map, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index a map with."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def tiles(height: int, width: int, tile: int, overlap: int, multiple_of: int = 1) -> list[Window]:
    """Windows of one size that cover a `height` x `width` map, evenly spread, row by row.

    A window is `tile` x `tile` pixels, or as long as the map where that is shorter. Neighbours share at least
    `overlap` pixels, and every window starts at a multiple of `multiple_of`, so that the grid of a patch
    network is the same in all of them.

    Raises:
        ArgumentError: `overlap` is not in 0 … tile − 1, or a length is no multiple of `multiple_of`.
    """
    if not 0 <= overlap < tile:
        raise ArgumentError(f"overlap={overlap} must be at least 0 and below tile={tile}.")
    for name, length in {"height": height, "width": width, "tile": tile, "overlap": overlap}.items():
        if length % multiple_of or (length < 1 and name != "overlap"):
            raise ArgumentError(f"{name}={length} must be a positive multiple of {multiple_of}. Pad it.")
    return [
        Window(top, left, min(tile, height), min(tile, width))
        for top in _starts(height, tile, overlap, multiple_of)
        for left in _starts(width, tile, overlap, multiple_of)
    ]


def blend(
    pieces: Iterable[tuple[Window, NDArray[np.float32]]], height: int, width: int, overlap: int
) -> NDArray[np.float32]:
    """The weighted mean of windows' maps, float32 [height, width].

    Weights rise as a squared sine over `overlap` pixels from each side of a window, so a window has almost no
    say at its own border. `pieces` may be a generator: one window's map at a time is held.
    """
    total = np.zeros((height, width))
    weights = np.zeros((height, width))
    for window, values in pieces:
        weight = np.outer(_ramp(window.height, overlap), _ramp(window.width, overlap))
        total[window.slices] += weight * values
        weights[window.slices] += weight
    return (total / weights).astype(np.float32)


def _starts(length: int, tile: int, overlap: int, multiple_of: int) -> list[int]:
    spare = max(length - tile, 0) // multiple_of
    steps = math.ceil(spare * multiple_of / (tile - overlap))
    return [spare * i // max(steps, 1) * multiple_of for i in range(steps + 1)]


def _ramp(length: int, overlap: int) -> NDArray[np.float64]:
    from_side = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.sin(np.minimum(from_side / max(overlap, 1), 1.0) * (math.pi / 2)) ** 2
