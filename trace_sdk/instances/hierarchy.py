"""From an edge map to nested partitions of the picture: watershed pieces, merged weakest border first.

The heights of the merges are an ultrametric contour map (Arbelaez et al., TPAMI 2011): made once, cut at any
threshold. A border that is an edge of probability p all along stays for every threshold up to p, so a cut holds
the connected components that edges separate (paper section 3.5); borders with a gap count by their mean.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.morphology import local_minima
from skimage.segmentation import watershed

WORKING = 1024  # longest side on which pieces are found, pixels; larger maps are reduced to about this
_SMOOTH = 1.0  # σ in working pixels: minima closer than this are one
_LEVELS = 50  # minima must differ by 1/50 of probability to be two


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Nested partitions of one picture.

    Attributes:
        pieces: int32 [H, W], the finest partition, 0 … R − 1, each piece connected.
        areas: int64 [R], pixels.
        borders: int32 [M, 2], neighbouring pieces, each pair once.
        lengths: float64 [M], pixel pairs along each border.
        totals: float64 [M], edge probability summed over those pairs (of a pair the larger).
        merges: int32 [≤ R − 1, 2], two pieces of the regions that become one, in order.
        heights: float64 [≤ R − 1], mean probability along the border that each merge removes, ascending.
    """

    pieces: NDArray[np.int32]
    areas: NDArray[np.int64]
    borders: NDArray[np.int32]
    lengths: NDArray[np.float64]
    totals: NDArray[np.float64]
    merges: NDArray[np.int32]
    heights: NDArray[np.float64]

    def cut(self, threshold: float, min_area: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The partition whose regions are separated by borders of mean probability `threshold` or more.

        A region under `min_area` pixels joins the neighbour behind its weakest border, all such regions at once,
        until none is left or one region is all.

        Returns:
            Region of each piece, int32 [R], numbered 0 … K − 1 from the largest to the smallest, and the score of
            each region, float64 [K] in [0, 1]: the mean edge probability along its outline (the rim of the
            picture left out; 0 if that is all there is), less the strongest border that was removed inside it,
            not counting specks that joined it.
        """
        made = int(np.searchsorted(self.heights, threshold))
        count = len(self.areas)
        before = _components(self.merges[:made], count)
        inside = np.zeros(before.max() + 1)
        np.maximum.at(inside, before[self.merges[:made, 0]], self.heights[:made])

        regions = self._without_specks(before, min_area)
        size = np.bincount(regions, self.areas)
        place = np.empty(len(size), np.int32)
        place[np.argsort(-size, kind="stable")] = np.arange(len(size), dtype=np.int32)
        regions = place[regions]

        # Of the regions that became one, the largest says how strong the inside is.
        by_size = np.argsort(np.bincount(before, self.areas), kind="stable")
        owner = np.empty(len(by_size), np.int32)
        owner[before] = regions
        strongest = np.zeros(len(size))
        strongest[owner[by_size]] = inside[by_size]
        return regions, np.clip(self._outline(regions, len(size)) - strongest, 0.0, 1.0)

    def _without_specks(self, regions: NDArray[np.int32], min_area: int) -> NDArray[np.int32]:
        while True:
            count = int(regions.max()) + 1
            small = np.bincount(regions, self.areas) < min_area
            if count == 1 or not small.any():
                return regions
            ends = regions[self.borders]
            apart = ends[:, 0] != ends[:, 1]
            pairs, lengths, totals = _summed(ends[apart], self.lengths[apart], self.totals[apart], count)
            both = np.concatenate([pairs, pairs[:, ::-1]])
            mean = np.tile(totals / lengths, 2)
            both, mean = both[small[both[:, 0]]], mean[small[both[:, 0]]]
            order = np.lexsort((both[:, 1], mean, both[:, 0]))
            _, first = np.unique(both[order, 0], return_index=True)
            regions = _components(both[order][first], count)[regions]

    def _outline(self, regions: NDArray[np.int32], count: int) -> NDArray[np.float64]:
        """Mean probability along each region's border with others: float64 [K]."""
        ends = regions[self.borders]
        apart = ends[:, 0] != ends[:, 1]
        length, total = np.zeros(count), np.zeros(count)
        for side in (0, 1):
            length += np.bincount(ends[apart, side], self.lengths[apart], count)
            total += np.bincount(ends[apart, side], self.totals[apart], count)
        mean: NDArray[np.float64] = np.divide(total, length, out=np.zeros(count), where=length > 0)
        return mean


def build_hierarchy(probability: NDArray[np.float32], seen: int | None = None) -> Hierarchy:
    """Pieces, their borders and the order in which they merge.

    Args:
        probability: float32 [H, W] in [0, 1].
        seen: longest side that the network saw, pixels, where it was less than the map's: finer detail than that
            is only enlargement, so pieces are found at about this size. Never above WORKING. Borders are then
            placed at full size between the nearest pieces.
    """
    step = max(1, round(max(probability.shape) / min(seen or WORKING, WORKING)))
    edges = _block_maxima(probability, step)
    found = _find_pieces(edges)
    pairs, lengths, totals = _find_borders(found, edges)
    merges, heights = _merge_weakest_first(int(found.max()) + 1, pairs, lengths, totals)
    pieces = _enlarge(found, step, probability.shape)
    areas = np.bincount(pieces.ravel(), minlength=int(found.max()) + 1)
    return Hierarchy(pieces, areas, pairs, lengths, totals, merges, heights)


def _block_maxima(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Maximum of each step × step block; unlike a mean it opens no gap in a thin line."""
    if step == 1:
        return values
    height, width = values.shape
    padded = np.pad(values, ((0, -height % step), (0, -width % step)), mode="edge")
    rows = np.maximum.reduceat(padded, np.arange(0, len(padded), step), axis=0)
    maxima: NDArray[np.float32] = rows.reshape(len(rows), -1, step).max(axis=2)
    return maxima


def _find_pieces(edges: NDArray[np.float32]) -> NDArray[np.int32]:
    """Watershed from the minima of the smoothed map; ridge pixels go to the side that reaches them first."""
    calm = np.rint(gaussian_filter(edges, _SMOOTH, mode="nearest") * _LEVELS).astype(np.uint8)
    markers, count = label(local_minima(calm))
    if count < 2:
        return np.zeros(edges.shape, np.int32)
    return np.asarray(watershed(edges, markers), np.int32) - 1  # type: ignore[no-untyped-call]


def _find_borders(
    pieces: NDArray[np.int32], edges: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    pairs, strengths = [], []
    for here, there in (((slice(None, -1),), (slice(1, None),)), ((..., slice(None, -1)), (..., slice(1, None)))):
        apart = pieces[here] != pieces[there]
        pairs.append(np.stack([pieces[here][apart], pieces[there][apart]], axis=1))
        strengths.append(np.maximum(edges[here][apart], edges[there][apart]))
    totals = np.concatenate(strengths).astype(np.float64)
    return _summed(np.concatenate(pairs), np.ones_like(totals), totals, int(pieces.max()) + 1)


def _summed(
    pairs: NDArray[np.int32], lengths: NDArray[np.float64], totals: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Each unordered pair once, its lengths and totals added up."""
    low, high = pairs.min(axis=1), pairs.max(axis=1)
    length = coo_matrix((lengths, (low, high)), (count, count)).tocsr().tocoo()
    total = coo_matrix((totals, (low, high)), (count, count)).tocsr().tocoo()
    # Both were summed over the same pairs, so both list them in the same order.
    return np.stack([length.row, length.col], axis=1).astype(np.int32), length.data, total.data


def _merge_weakest_first(
    count: int, pairs: NDArray[np.int32], lengths: NDArray[np.float64], totals: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Remove the border of the lowest mean, add up those that become one, and so on.

    The mean of two borders is not below the lower one, so heights never fall.
    """
    around: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    waiting = []
    for (a, b), length, total in zip(pairs.tolist(), lengths.tolist(), totals.tolist(), strict=True):
        around[a][b] = around[b][a] = (length, total)
        waiting.append((total / length, a, b))
    heapq.heapify(waiting)
    merges, heights = [], []
    while waiting:
        mean, a, b = heapq.heappop(waiting)
        border = around[a].get(b)
        if border is None or border[1] / border[0] != mean:
            continue  # the border changed since it was queued
        merges.append((a, b))
        heights.append(mean)
        if len(around[a]) < len(around[b]):
            a, b = b, a
        del around[a][b], around[b][a]
        for other, (length, total) in around[b].items():
            del around[other][b]
            known = around[a].get(other, (0.0, 0.0))
            joined = (known[0] + length, known[1] + total)
            around[a][other] = around[other][a] = joined
            heapq.heappush(waiting, (joined[1] / joined[0], min(a, other), max(a, other)))
        around[b].clear()
    return (
        np.array(merges, np.int32).reshape(-1, 2),
        np.maximum.accumulate(np.array(heights, np.float64)) if heights else np.zeros(0),
    )


def _components(links: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Which of `count` nodes the links join: int32 [count], numbered from 0."""
    graph = coo_matrix((np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def _enlarge(pieces: NDArray[np.int32], step: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Pieces at full size: nearest, and along borders the one with the most bilinear weight, so no blocks show."""
    if step == 1:
        return pieces
    height, width = shape
    full = np.repeat(np.repeat(pieces, step, axis=0)[:height], step, axis=1)[:, :width]
    full = np.ascontiguousarray(full)
    rows, columns = pieces.shape
    framed = np.pad(pieces, 1, mode="edge")
    corner = np.zeros((rows + 1, columns + 1), np.bool_)  # four pieces meet at (i, j)'s upper left corner
    for down, right in ((0, 1), (1, 0), (1, 1)):
        corner |= framed[down : rows + 1 + down, right : columns + 1 + right] != framed[: rows + 1, : columns + 1]
    mixed = corner[:-1, :-1] | corner[:-1, 1:] | corner[1:, :-1] | corner[1:, 1:]
    block_y, block_x = np.nonzero(mixed)
    within = np.arange(step)
    y = (block_y[:, None, None] * step + within[:, None]).repeat(step, axis=2).ravel()
    x = (block_x[:, None, None] * step + within).repeat(step, axis=1).ravel()
    kept = (y < height) & (x < width)
    y, x = y[kept], x[kept]
    top, left = (y + 0.5) / step + 0.5, (x + 0.5) / step + 0.5  # in the framed map
    i, j = top.astype(np.intp), left.astype(np.intp)
    low, near = (top - i).astype(np.float32), (left - j).astype(np.float32)
    around = np.stack([framed[i, j], framed[i, j + 1], framed[i + 1, j], framed[i + 1, j + 1]])
    weights = np.stack([(1 - low) * (1 - near), (1 - low) * near, low * (1 - near), low * near])
    votes = np.stack([(weights * (around == around[k])).sum(axis=0) for k in range(4)])
    full[y, x] = around[votes.argmax(axis=0), np.arange(len(y))]
    return full
