"""Affinities of the walk: how easily it goes from one cell to another without crossing an edge.

a_ij = (1 − largest edge probability on the straight path from i to j)^β for cells within a radius of 5, as in IRNet
(Ahn et al., CVPR 2019); T is a with its rows normalised.
"""

from __future__ import annotations

from functools import cache
from math import hypot

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import dia_array

RADIUS = 5  # cells
BETA = 10


def transition_matrix(edges: NDArray[np.float32], regions: NDArray[np.int32]) -> dia_array:
    """Row-normalised affinities T of a grid, [N, N] with N = h · w cells, row by row; 1 with the cell itself.

    One diagonal for each offset of the disc, which is how it is made; a walk of many vectors takes it by rows.

    Args:
        edges: float32 [h, w] in [0, 1].
        regions: int32 [h, w]; cells of different regions have affinity 0, and so have those under 0 with any other.
    """
    height, width = edges.shape
    # The power falls, so the path's largest edge is its least power.
    passage = (1 - edges) ** BETA
    upper: dict[int, NDArray[np.float32]] = {}  # a_ij at i, by j − i
    for down, right in _half_disc():
        if down >= height or abs(right) >= width:
            continue
        rows, columns = slice(0, height - down), slice(max(0, -right), width - max(0, right))
        narrowest = passage[rows, columns].copy()
        for y, x in _path(down, right)[1:]:
            left = columns.start + x
            np.minimum(narrowest, passage[y : y + height - down, left : left + width - abs(right)], out=narrowest)
        here = regions[rows, columns]
        together = here == regions[down:, columns.start + right : columns.stop + right]
        together &= here >= 0
        # On a narrow grid two offsets, of different rows, share a diagonal.
        diagonal = upper.setdefault(down * width + right, np.zeros(edges.size, np.float32))
        diagonal.reshape(height, width)[rows, columns] += narrowest * together
    total = np.ones(edges.size, np.float32)
    for offset, diagonal in upper.items():
        total += diagonal
        total[offset:] += diagonal[:-offset]
    # scipy keeps a diagonal by columns: that of offset o holds a_ij at j = i + o.
    scale = 1 / total
    offsets = [0, *upper, *(-offset for offset in upper)]
    data = np.zeros((len(offsets), edges.size), np.float32)
    data[0] = scale
    for place, (offset, diagonal) in enumerate(upper.items(), start=1):
        np.multiply(diagonal[:-offset], scale[:-offset], out=data[place, offset:])
        np.multiply(diagonal[:-offset], scale[offset:], out=data[place + len(upper), :-offset])
    return dia_array((data, offsets), shape=(edges.size, edges.size))


@cache
def _half_disc() -> list[tuple[int, int]]:
    """Offsets within RADIUS, one of each opposite pair: (0, 1) … downwards."""
    around = [(y, x) for y in range(RADIUS + 1) for x in range(-RADIUS, RADIUS + 1) if y > 0 or x > 0]
    return [(y, x) for y, x in around if hypot(y, x) <= RADIUS]


@cache
def _path(down: int, right: int) -> list[tuple[int, int]]:
    """Cells on the straight line from (0, 0) to (down, right), both ends included."""
    steps = max(down, abs(right))
    return [(round(down * i / steps), round(right * i / steps)) for i in range(steps + 1)]
