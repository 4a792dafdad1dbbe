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
    diagonals = {0: np.ones(edges.size, np.float32)}
    for down, right in _half_disc():
        if down >= height or abs(right) >= width:
            continue
        rows, columns = slice(0, height - down), slice(max(0, -right), width - max(0, right))
        narrowest = np.ones((height - down, width - abs(right)), np.float32)
        for y, x in _path(down, right):
            left = columns.start + x
            np.minimum(narrowest, passage[y : y + height - down, left : left + width - abs(right)], out=narrowest)
        here = regions[rows, columns]
        together = (here == regions[down:, columns.start + right : columns.stop + right]) & (here >= 0)
        affinity = np.zeros((height, width), np.float32)
        affinity[rows, columns] = narrowest * together
        # scipy keeps a diagonal by columns: that of offset o holds a_ij at j = i + o.
        offset = down * width + right
        for signed, diagonal in ((offset, np.roll(affinity.ravel(), offset)), (-offset, affinity.ravel())):
            # On a narrow grid two offsets, of different rows, share a diagonal.
            diagonals[signed] = diagonals.get(signed, np.float32(0)) + diagonal
    matrix = dia_array((np.stack(list(diagonals.values())), list(diagonals)), shape=(edges.size, edges.size))
    scale = 1 / (matrix @ np.ones(edges.size, np.float32))
    matrix.data *= np.stack([np.roll(scale, offset) for offset in diagonals])
    return matrix


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
