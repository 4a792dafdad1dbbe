"""From an edge map to nested partitions of the picture: watershed pieces, merged weakest border first.

The heights of the merges are an ultrametric contour map (Arbelaez et al., TPAMI 2011): made once, cut at any
threshold. A border that is an edge of probability p all along stays for every threshold up to p, so a cut holds
the connected components that edges separate (paper section 3.5); where an edge grows weak but leaves a trace, the
border counts by its mean.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from scipy.sparse import coo_matrix

from trace_sdk.instances.components import components
from trace_sdk.instances.watershed import watershed

WORKING = 1024  # longest side on which pieces are found, pixels; larger maps are reduced to about this
_SMOOTH = 1.0  # σ in working pixels: minima closer than this are one
_FLAT = np.float32(1e-3)  # share of the smoothed map that says which way flat ground falls: a quarter of a grey level
_LEVELS = 50  # minima must differ by 1/50 of probability to be two


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Nested partitions of one picture.

    Attributes:
        pieces: int32 [h, w], the finest partition, 0 … R − 1, each piece connected; at working size, see `enlarge`.
        areas: float64 [R], pixels of the picture.
        borders: int32 [M, 2], neighbouring pieces, each pair once.
        lengths: float64 [M], pixel pairs along each border.
        totals: float64 [M], edge probability summed over those pairs (of a pair the larger).
        merges: int32 [≤ R − 1, 2], two pieces of the regions that become one, in order.
        heights: float64 [≤ R − 1], mean probability along the border that each merge removes, ascending.
        step: side of the square of pixels that a working pixel stands for.
    """

    pieces: NDArray[np.int32]
    areas: NDArray[np.float64]
    borders: NDArray[np.int32]
    lengths: NDArray[np.float64]
    totals: NDArray[np.float64]
    merges: NDArray[np.int32]
    heights: NDArray[np.float64]
    step: int

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
        before = components(self.merges[:made], count)
        inside = np.zeros(before.max() + 1)
        np.maximum.at(inside, before[self.merges[:made, 0]], self.heights[:made])

        regions = join_specks(before, self.areas, min_area, self.borders, self.lengths, self.totals)
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
            is only enlargement, so pieces are found at about this size. Never above WORKING.
    """
    step = max(1, round(max(probability.shape) / min(seen or WORKING, WORKING)))
    edges = block_maxima(probability, step)
    found = _find_pieces(edges)
    pairs, lengths, totals = find_borders(found, edges)
    merges, heights = merge_weakest_first(int(found.max()) + 1, pairs, lengths, totals)
    areas = np.bincount(found.ravel()).astype(np.float64) * (probability.size / found.size)
    return Hierarchy(found, areas, pairs, lengths, totals, merges, heights, step)


def join_specks(
    regions: NDArray[np.int32],
    areas: NDArray[np.float64],
    min_area: float,
    borders: NDArray[np.int32],
    lengths: NDArray[np.float64],
    totals: NDArray[np.float64],
) -> NDArray[np.int32]:
    """The rule for small regions.

    A region under `min_area` joins the neighbour behind its weakest border (the lowest mean probability; of equal
    ones the lower number), all such at once, until none is left that has a neighbour.

    Args:
        regions: int32 [R], region of each piece, from 0.
        areas: float64 [R], of the pieces. borders, lengths, totals: as in `Hierarchy`.

    Returns:
        int32 [R], regions numbered anew from 0.
    """
    while True:
        count = int(regions.max(initial=-1)) + 1
        small = np.bincount(regions, areas, count) < min_area
        ends = regions[borders]
        open_ended = (ends[:, 0] != ends[:, 1]) & small[ends].any(axis=1)
        if not open_ended.any():
            return regions
        pairs, length, total = summed(ends[open_ended], lengths[open_ended], totals[open_ended], count)
        both = np.concatenate([pairs, pairs[:, ::-1]])
        mean = np.tile(total / length, 2)
        both, mean = both[small[both[:, 0]]], mean[small[both[:, 0]]]
        order = np.lexsort((both[:, 1], mean, both[:, 0]))
        _, first = np.unique(both[order, 0], return_index=True)
        regions = components(both[order][first], count)[regions]


def block_maxima(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Maximum of each step × step block; unlike a mean it opens no gap in a thin line."""
    if step == 1:
        return values
    height, width = values.shape
    rows = values[::step].copy()
    for first in range(1, min(step, height)):
        some = values[first::step]
        np.maximum(rows[: len(some)], some, out=rows[: len(some)])
    maxima: NDArray[np.float32] = rows[:, ::step].copy()
    for first in range(1, min(step, width)):
        some = rows[:, first::step]
        np.maximum(maxima[:, : some.shape[1]], some, out=maxima[:, : some.shape[1]])
    return maxima


def _find_pieces(edges: NDArray[np.float32]) -> NDArray[np.int32]:
    """Watershed from the minima of the smoothed map; ridge pixels go to the lower side."""
    smooth = gaussian_filter(edges, _SMOOTH, mode="nearest")
    markers, count = label(find_minima(np.rint(smooth * _LEVELS).astype(np.uint8)))
    if count < 2:
        return np.zeros(edges.shape, np.int32)
    return watershed(edges + _FLAT * smooth, markers) - 1


def find_minima(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Plateaus of uint8 [h, w], connected by sides and corners, without a lower neighbour.

    As scikit-image's local_minima with values under 255, in a quarter of its time.
    """
    lowest = values == _least_around(values)
    # Plateaus are whole or not at all: a pixel of equal height that has a lower neighbour drains all of its plateau.
    drains = lowest & (_least_around(np.where(lowest, np.uint8(255), values)) == values)
    plateaus, count = label(lowest, np.ones((3, 3), np.int8))
    dry = np.ones(count + 1, np.bool_)
    dry[0] = False
    dry[plateaus[drains]] = False
    minima: NDArray[np.bool_] = dry.take(plateaus)
    return minima


def _least_around(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The least of each pixel and its eight neighbours."""
    least = values.copy()
    np.minimum(least[1:], values[:-1], out=least[1:])
    np.minimum(least[:-1], values[1:], out=least[:-1])
    across = least.copy()
    np.minimum(across[:, 1:], least[:, :-1], out=across[:, 1:])
    np.minimum(across[:, :-1], least[:, 1:], out=across[:, :-1])
    return across


def find_borders(
    pieces: NDArray[np.int32], edges: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Neighbouring pieces, pixel pairs along their border and edge probability summed over them, as in `Hierarchy`."""
    pairs, strengths = [], []
    for here, there in (np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:]):
        apart = pieces[here] != pieces[there]
        pairs.append(np.stack([pieces[here][apart], pieces[there][apart]], axis=1))
        strengths.append(np.maximum(edges[here][apart], edges[there][apart]))
    totals = np.concatenate(strengths).astype(np.float64)
    return summed(np.concatenate(pairs), np.ones_like(totals), totals, int(pieces.max()) + 1)


def summed(
    pairs: NDArray[np.int32], lengths: NDArray[np.float64], totals: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Each unordered pair once, its lengths and totals added up."""
    low, high = pairs.min(axis=1), pairs.max(axis=1)
    # Both at once, as one complex number.
    both = coo_matrix((lengths + 1j * totals, (low, high)), (count, count)).tocsr().tocoo()
    return np.stack([both.row, both.col], axis=1).astype(np.int32), both.data.real, both.data.imag


def merge_weakest_first(
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


def merge_tree(count: int, merges: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Groups that `merges` int32 [J, 2] make one after the other, numbered from `count` on; before them each region.

    Returns:
        the two groups that each of them was made of, int32 [J, 2], and the regions of all, bool [count + J, count].
    """
    joins = np.zeros((len(merges), 2), np.int32)
    members = np.zeros((count + len(merges), count), np.bool_)
    np.fill_diagonal(members, True)
    of = list(range(count))  # the group that is named by a region
    for number, (a, b) in enumerate(merges.tolist()):
        joins[number] = of[a], of[b]
        members[count + number] = members[of[a]] | members[of[b]]
        of[a] = of[b] = count + number
    return joins, members


def enlarge(regions: NDArray[np.int32], shape: tuple[int, ...], step: int) -> NDArray[np.int32]:
    """A map of regions at working size → at full size, int32 `shape`. step: see `Hierarchy`.

    The nearest region; along borders the one with the most bilinear weight, so that no blocks show.
    """
    height, width = shape
    if step == 1:
        return regions
    full = np.repeat(np.repeat(regions, step, axis=0), step, axis=1)
    rows, columns = regions.shape
    blocks = full.reshape(rows, step, columns, step)
    framed = np.pad(regions, 1, mode="edge")
    low, near = np.arange(rows + 1), np.arange(columns + 1)
    around = [framed[np.ix_(low + down, near + right)] for down in (0, 1) for right in (0, 1)]
    mixed = (around[1] != around[0]) | (around[2] != around[0]) | (around[3] != around[0])
    # A pixel lies between the centres of four blocks, and how far from each depends on its place in its block only.
    for down, right in np.ndindex(step, step):
        y, x = (down + 0.5) / step - 0.5, (right + 0.5) / step - 0.5
        above, left = int(y < 0), int(x < 0)
        i, j = np.nonzero(mixed[1 - above : rows + 1 - above, 1 - left : columns + 1 - left])
        four = [corner[i + 1 - above, j + 1 - left] for corner in around]
        share = np.outer((1 - y % 1, y % 1), (1 - x % 1, x % 1)).astype(np.float32)
        best, chosen = np.float32(0), four[0]
        for candidate in four:
            votes = sum(weight * (corner == candidate) for weight, corner in zip(share.ravel(), four, strict=True))
            chosen, best = np.where(votes > best, candidate, chosen), np.maximum(votes, best)
        blocks[i, down, j, right] = chosen
    return np.ascontiguousarray(full[:height, :width])
