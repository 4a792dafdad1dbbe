"""The random walk that spreads what a mask has of a region, with the rest of the region as background.

IRNet applies T 2⁸ times; on cells twice as long as its own a quarter of that goes as far, at an eighth of the cost.
Applying T that often to a vector costs 64 products; squaring T six times fills the matrix. T^s is instead expanded in
Chebyshev polynomials, whose coefficients for x^s fall off beyond √(2s): 20 products, with an error below TAIL in
the norm that T contracts (Sachdeva and Vishnoi, 2014, theorem 3.3). The walk never leaves a region, so regions share
vectors: there are as many as fragments in the region that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.sparse import csr_array, dia_array
from scipy.special import gammaln

from trace_sdk.instances.affinity import transition_matrix
from trace_sdk.instances.boxed import Box, BoxedMask, box_of, overlap, shifted, widened
from trace_sdk.instances.hierarchy import block_maxima

STEPS = 2**8 // 4
GRID = 64  # longest side of the walk's grid, cells: a stride of 8 at 512 px
WHOLE = 0.9  # share of a region from which all of it counts as reached
TOGETHER = 16  # vectors that walk at once: a matrix is read once for all of them
TAIL = 1e-2  # bound on the error of T^s


@dataclass(frozen=True, eq=False)
class Fragment:
    """Part of a mask in one region. instance: number among the mask's own. share: of the region's pixels, in (0, 1]."""

    mask: int
    region: int
    instance: int
    share: float


class Regions:
    """The regions of a picture.

    Attributes:
        labels: int32 [H, W], the region of each pixel, from 0.
        areas: int64 [R], pixels.
        boxes: rows and columns of each.
    """

    def __init__(self, labels: NDArray[np.int32]) -> None:
        self.labels = labels
        self.areas = np.bincount(labels.ravel())
        self.boxes: list[Box] = find_objects(labels + 1)


def spread_fragments(
    probability: NDArray[np.float32],
    regions: Regions,
    masks: Sequence[BoxedMask],
    fragments: Sequence[Fragment],
    least: float,
) -> list[tuple[Box, NDArray[np.float32]]]:
    """For each fragment how much the walk brings to each pixel of its region, from 0 (least) to 1 in the region.

    A box and the values in it, 0 outside the region; beyond the box no value is above `least`.
    """
    # A walk that starts nearly everywhere reaches everything.
    rises = {
        place: (regions.boxes[one.region], (regions.labels[regions.boxes[one.region]] == one.region).astype(np.float32))
        for place, one in enumerate(fragments)
        if one.share >= WHOLE
    }
    if places := [place for place in range(len(fragments)) if place not in rises]:
        step = max(1, ceil(max(probability.shape) / GRID))
        grid = _Grid(block_maxima(probability, step), regions, step, least)
        rises |= zip(places, grid.rises(masks, [fragments[place] for place in places]), strict=True)
    return [rises[place] for place in range(len(fragments))]


class _Grid:
    """The walk on cells of `step` × `step` pixels, each in the region of its centre."""

    def __init__(self, edges: NDArray[np.float32], regions: Regions, step: int, least: float) -> None:
        self._edges, self._step, self._regions, self._least = edges, step, regions, least
        middles = [
            np.minimum(np.arange(cells) * step + step // 2, length - 1)
            for cells, length in zip(edges.shape, regions.labels.shape, strict=True)
        ]
        self._cells = regions.labels[np.ix_(*middles)]

    def rises(self, masks: Sequence[BoxedMask], fragments: Sequence[Fragment]) -> list[tuple[Box, NDArray[np.float32]]]:
        # The walk never leaves a region, so fragments of different regions share a column.
        used: dict[int, int] = {}
        columns = []
        for fragment in fragments:
            columns.append(used.get(fragment.region, 0))
            used[fragment.region] = columns[-1] + 1
        count = len(self._regions.boxes)
        columns_of = np.bincount(list(used), list(used.values()), minlength=count).astype(np.int64)[self._cells]
        seeds = np.zeros((max(columns) + 1, *self._cells.shape), np.float32)
        covered: dict[int, tuple[Box, NDArray[np.float32]]] = {}
        for fragment, column in zip(fragments, columns, strict=True):
            if fragment.mask not in covered:
                covered[fragment.mask] = self._block_means(masks[fragment.mask])
            box, means = covered[fragment.mask]
            own = self._cells[box] == fragment.region
            seeds[column][box][own] = means[own]
        shares = self._walked(seeds, columns_of)
        return [
            self._lifted(fragment.region, shares[column]) for fragment, column in zip(fragments, columns, strict=True)
        ]

    def _block_means(self, mask: BoxedMask) -> tuple[Box, NDArray[np.float32]]:
        """The cells that a mask lies in, and the share of each that it has; those at the rim are smaller."""
        box = self._cells_of(mask.box)
        picture = PIL.Image.fromarray(mask.within(self._pixels_of(box)).view(np.uint8) * np.uint8(255))
        return box, np.asarray(picture.reduce(self._step), np.float32) / np.float32(255)

    def _cells_of(self, box: Box) -> Box:
        rows, columns = (slice(side.start // self._step, -(-side.stop // self._step)) for side in box)
        return rows, columns

    def _pixels_of(self, cells: Box) -> Box:
        rows, columns = (
            slice(side.start * self._step, min(length, side.stop * self._step))
            for side, length in zip(cells, self._regions.labels.shape, strict=True)
        )
        return rows, columns

    def _walked(self, seeds: NDArray[np.float32], columns_of: NDArray[np.int64]) -> NDArray[np.float32]:
        """T^steps of each of [M, h, w]; `columns_of`: how many of them a cell's region takes part in, [h, w]."""
        walked = np.zeros_like(seeds)
        window = box_of(columns_of > 0, 0)
        seeds, columns_of = seeds[:, *window], columns_of[window]
        if not columns_of.size:
            return walked
        # Cells of regions without a fragment are nobody's way.
        regions = np.where(columns_of > 0, self._cells[window], np.int32(-1))
        transition = csr_array(transition_matrix(self._edges[window], regions))
        for first in range(0, len(seeds), TOGETHER):
            # The walk of later columns is that of fewer regions.
            own = columns_of > first
            some = slice(first, first + TOGETHER)
            places = np.flatnonzero(own)
            vectors = np.ascontiguousarray(seeds[some, own].T)
            walked[some, *window][:, own] = spread(transition[places][:, places], vectors, STEPS).T
        return walked

    def _lifted(self, region: int, shares: NDArray[np.float32]) -> tuple[Box, NDArray[np.float32]]:
        """From cells to pixels of a region: bilinear, from cells of the region only, stretched to [0, 1]."""
        window = widened(self._cells_of(self._regions.boxes[region]), 1, self._cells.shape)
        own = self._cells[window] == region
        share = shares[window][own]
        if not len(share):
            return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), np.float32)
        low = share.min()
        rise = np.zeros(own.shape, np.float32)
        rise[own] = (share - low) / max(share.max() - low, np.float32(1e-3))
        # A pixel lies between cells, so it is above `least` beside a cell that is, and takes from those beside it.
        around = box_of(rise > self._least)
        cells = shifted(around, window[0].start, window[1].start)
        box = overlap(self._pixels_of(cells), self._regions.boxes[region])
        some = widened(around, 1, own.shape)
        down, aside = (
            _between(pixels, side.start + part.start, self._step, part.stop - part.start)
            for pixels, side, part in zip(box, window, some, strict=True)
        )
        weight = down @ own[some].astype(np.float32) @ aside.T
        lifted = (down @ rise[some] @ aside.T) / np.maximum(weight, np.float32(1e-6))
        lifted[self._regions.labels[box] != region] = 0
        return box, lifted


def spread(transition: dia_array | csr_array, vector: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """transition^steps · vector, float32 [N] or [N, M], to within TAIL of each vector's norm.

    x^s = Σ_j c_j T_j(x), with c_j the chance that the heads and tails of s fair coins differ by j; the sum stops
    where the chances left fall under TAIL. This needs real eigenvalues in [−1, 1], which symmetric affinities give.
    """
    degrees = np.arange(steps % 2, steps + 1, 2)
    heads = (steps + degrees) // 2
    ways = gammaln(steps + 1) - gammaln(heads + 1) - gammaln(steps - heads + 1)
    chances = np.exp(ways - steps * np.log(2)) * np.where(degrees > 0, 2, 1)
    wanted = int(np.searchsorted(np.cumsum(chances), 1 - TAIL)) + 1
    chance = dict(zip(degrees[:wanted].tolist(), chances[:wanted].astype(np.float32), strict=True))
    last, current = vector, transition @ vector
    result = chance.get(0, np.float32(0)) * last + chance.get(1, np.float32(0)) * current
    for degree in range(2, max(chance) + 1):
        following = transition @ current
        following *= 2
        following -= last
        last, current = current, following
        if degree in chance:
            result += chance[degree] * current
    return np.asarray(result, np.float32)


def _between(pixels: slice, first: int, step: int, length: int) -> NDArray[np.float32]:
    """Weights of linear interpolation along one axis between `length` cells from `first` on, [pixels, cells]."""
    place = np.clip((np.arange(pixels.start, pixels.stop) + 0.5) / step - 0.5 - first, 0, length - 1)
    weights: NDArray[np.float32] = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(length))).astype(np.float32)
    return weights
