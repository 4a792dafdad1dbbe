"""Background-Guided Propagation (paper section 3.5): masks of others, made to agree with the edges.

1. Regions. The picture is cut with the edges as separators (`EdgeMap.instances`). What a mask has in a region is a
   fragment.
2. Split. A region counts for a mask if half of it lies in the mask, or half of the mask in it; the rest is a loose
   border and is left out. Regions that count are joined where the border between them is weaker than INNER times the
   mask's own outline; of those left, one with less than SPLIT of the mask joins its neighbour behind the weakest
   border. Each that is left becomes an instance.
3. Walk. Each fragment is spread by a random walk that stays in its region: a_ij = (1 − largest edge probability on
   the straight path from i to j)^β for cells within a radius of 5, as in IRNet (Ahn et al., CVPR 2019), rows
   normalised, 2⁸ steps. The background, i.e. the rest of the region, spreads the same way and so falls where the
   mask's share rises. The results at three levels between the lowest and the highest share, the whole region and the
   fragment as it was (also without its holes) are compared: the one with the strongest edges along its outline stays,
   the fragment itself unless another is stronger by MARGIN. What has an IoU under ALIKE with the fragment is not
   taken: edges may move an outline, not choose another thing. The same is asked of an unsplit mask as a whole.
4. Merge. While any two results have IoU > 0.5, all that hang together so become one, at once, so that the order of
   the masks doesn't matter.

2⁸ applications of T to a vector cost 2⁸ products; squaring T eight times fills the matrix. T^s is instead expanded in
Chebyshev polynomials, whose coefficients for x^s fall off beyond √(2s): 42 products in place of 256, with an error
below TAIL in the norm that T contracts (Sachdeva and Vishnoi, 2014, theorem 3.3). The walk never leaves a region, so
regions share vectors: there are as many as fragments in the region that has most. A region of more than LARGE cells
walks on cells twice as long, a quarter of the steps: as far, at an eighth of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, hypot
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pycocotools import mask as codec
from scipy.ndimage import find_objects, label
from scipy.sparse import csr_array, csr_matrix, dia_array
from scipy.stats import binom

from trace_sdk.instances.hierarchy import (
    Hierarchy,
    block_maxima,
    components,
    enlarge,
    join_specks,
    merge_weakest_first,
    summed,
)

RADIUS = 5  # cells
BETA = 10
STEPS = 2**8
GRID = 128  # longest side of the walk's grid, cells: a stride of 4 at 512 px, as IRNet's
SPLIT = 0.2  # share of a mask that makes a fragment an instance of its own
SAME = 0.5  # IoU above which two results are one
LEVELS = (0.25, 0.5, 0.75)  # between the lowest share of the mask in the region (0) and the highest (1)
INNER = 0.9  # strength of a line that splits a mask, to that of the mask's outline without its holes
ALIKE = 0.4  # IoU of a new outline with its fragment
MARGIN = 1.1  # strength of a new outline, to that of the old one
LARGE = 1024  # cells from which a region walks on the coarser grid
TOGETHER = 16  # vectors that walk at once: a matrix is read once for all of them
TAIL = 1e-2  # bound on the error of T^s


@dataclass(frozen=True, eq=False)
class RefinedMasks:
    """Masks after propagation, best score first; where scores are equal, in an order of their own shape.

    Attributes:
        rle: each mask as COCO RLE with counts as bytes, K of them, as pycocotools takes them.
        scores: float64 [K]: score of the mask it came from times IoU of the result with the fragment it came from; of
            merged ones the highest.
        sources: for each, the indices of the masks it came from, ascending.
        shape: height and width of the picture.
    """

    rle: list[dict[str, Any]]
    scores: NDArray[np.float64]
    sources: list[list[int]]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rle)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """bool [K, H, W]; made at each call."""
        if not self.rle:
            return np.zeros((0, *self.shape), np.bool_)
        masks: NDArray[np.bool_] = np.moveaxis(codec.decode(self.rle), -1, 0).astype(np.bool_)
        return masks

    def to_coco(self) -> list[dict[str, Any]]:
        """Each mask as COCO RLE with counts as text, for JSON."""
        return [{"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")} for runs in self.rle]


@dataclass(frozen=True, eq=False)
class Fragment:
    """Part of a mask in one region. `instance`: number among the mask's own, see step 2."""

    mask: int
    region: int
    instance: int


def propagate(
    probability: NDArray[np.float32],
    hierarchy: Hierarchy,
    threshold: float,
    min_area: int,
    masks: NDArray[np.bool_],
    scores: NDArray[np.float64],
) -> RefinedMasks:
    """Refine bool [K, H, W] masks of one picture; see the module's head for the steps, `EdgeMap.refine` for use."""
    of_piece, _ = hierarchy.cut(threshold, min_area)
    regions = enlarge(of_piece[hierarchy.pieces], probability.shape)
    filled = without_holes(masks)
    fragments = split_masks(probability, hierarchy, of_piece, regions, masks, filled)
    walk = _Walk(probability, regions)
    parts = walk.spread(masks, filled, fragments)

    found: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for fragment, part in zip(fragments, parts, strict=True):
        whole = found.setdefault((fragment.mask, fragment.instance), np.zeros(probability.size, np.bool_))
        whole[walk.pixels(fragment.region)] = part
    alone = np.bincount([index for index, _ in found], minlength=len(masks)) == 1
    runs, kept, sources = [], [], []
    for (index, _), flat in found.items():
        mask, original = flat.reshape(probability.shape), masks[index]
        if alone[index] and outline_strength(mask, probability) < MARGIN * outline_strength(original, probability):
            mask = original
        agreement = np.count_nonzero(mask & original) / np.count_nonzero(mask | original)
        runs.append(codec.encode(np.asfortranarray(mask, np.uint8)))
        kept.append(scores[index] * agreement)
        sources.append([index])
    runs, kept, sources = _merge(runs, kept, sources)
    order = sorted(range(len(runs)), key=lambda i: (-kept[i], runs[i]["counts"]))
    height, width = probability.shape
    return RefinedMasks(
        [runs[i] for i in order], np.array([kept[i] for i in order]), [sources[i] for i in order], (height, width)
    )


def split_masks(
    probability: NDArray[np.float32],
    hierarchy: Hierarchy,
    of_piece: NDArray[np.int32],
    regions: NDArray[np.int32],
    masks: NDArray[np.bool_],
    filled: NDArray[np.bool_],
) -> list[Fragment]:
    """Step 2: which regions of each mask count, and as which of its instances; `filled` are the masks without holes."""
    count = int(of_piece.max()) + 1
    areas = np.bincount(regions.ravel(), minlength=count)
    ends = of_piece[hierarchy.borders]
    apart = ends[:, 0] != ends[:, 1]
    ends, lengths, totals = summed(ends[apart], hierarchy.lengths[apart], hierarchy.totals[apart], count)
    fragments = []
    for index, mask in enumerate(masks):
        box = _box(mask)
        held = np.bincount(regions[box][mask[box]], minlength=count)
        counting = (2 * held >= np.minimum(areas, held.sum())) & (held > 0)
        chosen = np.flatnonzero(counting)
        number = np.full(count, -1, np.int32)
        number[chosen] = np.arange(len(chosen), dtype=np.int32)
        inner = counting[ends].all(axis=1)
        borders = number[ends[inner]], lengths[inner], totals[inner]
        merges, heights = merge_weakest_first(len(chosen), *borders)
        needed = INNER * outline_strength(filled[index][box], probability[box])
        joined = components(merges[: np.searchsorted(heights, needed)], len(chosen))
        instances = join_specks(joined, held[chosen].astype(np.float64), SPLIT * held.sum(), *borders)
        fragments += [
            Fragment(index, int(region), int(instance)) for region, instance in zip(chosen, instances, strict=True)
        ]
    return fragments


class _Grid:
    """The random walk on cells of `step` × `step` pixels, each in the region of its centre."""

    def __init__(
        self,
        probability: NDArray[np.float32],
        regions: NDArray[np.int32],
        step: int,
        steps: int,
        pixels: NDArray[np.bool_],
    ) -> None:
        """`pixels`: bool [H, W], those of the regions that are to walk here."""
        self._shape, self._step, self._steps = probability.shape, step, steps
        self._pixels = np.flatnonzero(pixels)
        edges = block_maxima(probability, step)
        rows, columns = edges.shape
        middle_y = np.minimum(np.arange(rows) * step + step // 2, self._shape[0] - 1)
        middle_x = np.minimum(np.arange(columns) * step + step // 2, self._shape[1] - 1)
        self._regions, self._cells = regions, regions[np.ix_(middle_y, middle_x)]
        self._edges = edges

    def rises(self, masks: NDArray[np.bool_], fragments: Sequence[Fragment]) -> list[NDArray[np.float32]]:
        """For each fragment a map at full size: its share after the walk, in its region from 0 (lowest) to 1."""
        if not fragments:
            return []
        # The walk never leaves a region, so fragments of different regions share a column.
        used: dict[int, int] = {}
        columns = []
        for fragment in fragments:
            columns.append(used.get(fragment.region, 0))
            used[fragment.region] = columns[-1] + 1
        cells = self._cells.ravel()
        order = np.argsort(cells, kind="stable")
        count = int(self._regions.max()) + 1
        bounds = np.searchsorted(cells[order], np.arange(count + 1))
        seeds = np.zeros((max(columns) + 1, len(cells)), np.float32)
        covered: dict[int, NDArray[np.float32]] = {}
        for fragment, column in zip(fragments, columns, strict=True):
            if fragment.mask not in covered:
                covered[fragment.mask] = _block_means(masks[fragment.mask], self._step).ravel()
            own = order[bounds[fragment.region] : bounds[fragment.region + 1]]
            seeds[column, own] = covered[fragment.mask][own]
        shares = self._walked(seeds, np.bincount(list(used), list(used.values()), minlength=count)[cells])

        rise = np.zeros_like(shares)
        for fragment, column in zip(fragments, columns, strict=True):
            own = order[bounds[fragment.region] : bounds[fragment.region + 1]]
            if len(own):
                share = shares[column, own]
                rise[column, own] = (share - share.min()) / max(float(np.ptp(share)), 1e-3)
        lift = self._lift()
        lifted = np.zeros((len(rise), *self._shape), np.float32)
        for values, full in zip(rise, lifted, strict=True):
            full.ravel()[self._pixels] = lift @ values
        return [lifted[column] for column in columns]

    def _walked(self, seeds: NDArray[np.float32], columns_of: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """T^steps of each row; `columns_of`: how many of the rows a cell's region takes part in."""
        transition = csr_array(transition_matrix(self._edges, self._cells))
        shares = np.zeros_like(seeds)
        for first in range(0, len(seeds), TOGETHER):
            # The walk of later columns is that of fewer regions.
            own = np.flatnonzero(columns_of > first)
            some = slice(first, first + TOGETHER)
            vectors = np.ascontiguousarray(seeds[some, own].T)
            shares[some, own] = spread(transition[own][:, own], vectors, self._steps).T
        return shares

    def _lift(self) -> csr_matrix:
        """Bilinear interpolation from cells to pixels, from cells of the pixel's own region only: [pixels, cells]."""
        rows, columns = self._cells.shape
        (top, low), (left, right) = (
            _between(length, self._step, cells) for length, cells in zip(self._shape, self._cells.shape, strict=True)
        )
        place_y, place_x = np.divmod(self._pixels, self._shape[1])
        top, low, left, right = top[place_y], low[place_y], left[place_x], right[place_x]
        own, cells = self._regions.ravel()[self._pixels], self._cells.ravel()
        corners, weights = [], []
        for down in (0, 1):
            for aside in (0, 1):
                corner = np.minimum(top + down, rows - 1) * columns + np.minimum(left + aside, columns - 1)
                corners.append(corner)
                weights.append(np.abs(1 - down - low) * np.abs(1 - aside - right) * (cells[corner] == own))
        indices, values = np.stack(corners, axis=1).astype(np.int32), np.stack(weights, axis=1).astype(np.float32)
        pointers = np.arange(0, indices.size + 1, 4)
        return csr_matrix((values.ravel(), indices.ravel(), pointers), (len(indices), rows * columns))


class _Walk:
    """Step 3 for one picture. Large regions walk on cells twice as long, where a quarter of the steps goes as far."""

    def __init__(self, probability: NDArray[np.float32], regions: NDArray[np.int32]) -> None:
        self._probability, self._regions = probability, regions
        step = max(1, ceil(max(probability.shape) / GRID))
        self._boxes = find_objects(regions + 1)
        self._sorted = np.argsort(regions.ravel(), kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(regions.ravel()))])
        self._large = np.diff(self._bounds) > LARGE * step**2
        coarse = self._large[regions]
        self._fine = _Grid(probability, regions, step, STEPS, ~coarse)
        self._coarse = _Grid(probability, regions, 2 * step, STEPS // 4, coarse)

    def pixels(self, region: int) -> NDArray[np.intp]:
        """Flat indices of a region's pixels."""
        return self._sorted[self._bounds[region] : self._bounds[region + 1]]

    def spread(
        self, masks: NDArray[np.bool_], filled: NDArray[np.bool_], fragments: Sequence[Fragment]
    ) -> list[NDArray[np.bool_]]:
        """Step 3: for each fragment, which of its region's pixels it now has."""
        rises: dict[int, NDArray[np.float32]] = {}
        for grid, large in ((self._fine, False), (self._coarse, True)):
            places = [place for place, one in enumerate(fragments) if self._large[one.region] == large]
            rises |= zip(places, grid.rises(masks, [fragments[place] for place in places]), strict=True)
        return [
            self._best_outline(masks[fragment.mask], filled[fragment.mask], fragment.region, rises[place])
            for place, fragment in enumerate(fragments)
        ]

    def _best_outline(
        self, mask: NDArray[np.bool_], filled: NDArray[np.bool_], region: int, rise: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        # One more pixel around, where there is one, to see the edge on the outer side.
        rows, columns = self._boxes[region]
        box = (slice(max(0, rows.start - 1), rows.stop + 1), slice(max(0, columns.start - 1), columns.stop + 1))
        inside = self._regions[box] == region
        fragment = mask[box] & inside
        if np.array_equal(fragment, inside):
            return np.ones(np.count_nonzero(inside), np.bool_)
        best, strongest = fragment, MARGIN * outline_strength(fragment, self._probability[box])
        for candidate in (
            inside,
            filled[box] & inside,
            *(inside & (rise[box] > level) for level in LEVELS),
        ):
            common, either = np.count_nonzero(candidate & fragment), np.count_nonzero(candidate | fragment)
            if common >= ALIKE * either:
                strength = outline_strength(candidate, self._probability[box])
                if strength > strongest:
                    best, strongest = candidate, strength
        kept: NDArray[np.bool_] = best[inside]
        return kept


def outline_strength(mask: NDArray[np.bool_], probability: NDArray[np.float32]) -> float:
    """Mean edge probability along the outline of a mask, of each pixel pair the larger; 0 without an outline."""
    box = _box(mask)
    mask, probability = mask[box], probability[box]
    total, length = 0.0, 0
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        crossed = mask[here] != mask[there]
        total += float(np.maximum(probability[here][crossed], probability[there][crossed]).sum(dtype=np.float64))
        length += int(np.count_nonzero(crossed))
    return total / length if length else 0.0


def without_holes(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The masks with their holes filled, bool [K, H, W]."""
    filled = masks.copy()
    for mask in filled:
        box = _box(mask)
        outside, _ = label(~np.pad(mask[box], 1))
        mask[box] = (outside != outside[0, 0])[1:-1, 1:-1]
    return filled


def transition_matrix(edges: NDArray[np.float32], regions: NDArray[np.int32]) -> dia_array:
    """Row-normalised affinities T of a grid, [N, N] with N = h · w cells, row by row; 1 with the cell itself.

    One diagonal for each offset of the disc, which is how it is made; a walk of many vectors takes it by rows.

    Args:
        edges: float32 [h, w] in [0, 1].
        regions: int32 [h, w]; cells of different regions have affinity 0.
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
        together = regions[rows, columns] == regions[down:, columns.start + right : columns.stop + right]
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


def spread(transition: dia_array | csr_array, vector: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """transition^steps · vector, float32 [N] or [N, M], to within TAIL of each vector's norm.

    x^s = Σ_j c_j T_j(x), with c_j the chance that the heads and tails of s fair coins differ by j; the sum stops
    where the chances left fall under TAIL. This needs real eigenvalues in [−1, 1], which symmetric affinities give.
    """
    degrees = np.arange(steps % 2, steps + 1, 2)
    chances = binom.pmf((steps + degrees) // 2, steps, 0.5) * np.where(degrees > 0, 2, 1)
    wanted = int(np.searchsorted(np.cumsum(chances), 1 - TAIL)) + 1
    chance = dict(zip(degrees[:wanted].tolist(), chances[:wanted].astype(np.float32), strict=True))
    last, current = vector, transition @ vector
    result = chance.get(0, np.float32(0)) * last + chance.get(1, np.float32(0)) * current
    for degree in range(2, max(chance) + 1):
        last, current = current, 2 * (transition @ current) - last
        if degree in chance:
            result += chance[degree] * current
    return np.asarray(result, np.float32)


def _merge(
    runs: list[dict[str, Any]], scores: list[float], sources: list[list[int]]
) -> tuple[list[dict[str, Any]], list[float], list[list[int]]]:
    """Step 4: unions of what hangs together by IoU > SAME, until no pair does."""
    while len(runs) > 1:
        overlap = codec.iou(runs, runs, [0] * len(runs))
        group = components(np.argwhere(np.triu(overlap > SAME, 1)).astype(np.int32), len(runs))
        if group.max() + 1 == len(runs):
            break
        members = [np.flatnonzero(group == number).tolist() for number in range(group.max() + 1)]
        runs = [codec.merge([runs[i] for i in ids]) if len(ids) > 1 else runs[ids[0]] for ids in members]
        scores = [max(scores[i] for i in ids) for ids in members]
        sources = [sorted({index for i in ids for index in sources[i]}) for ids in members]
    return runs, scores, sources


def _half_disc() -> list[tuple[int, int]]:
    """Offsets within RADIUS, one of each opposite pair: (0, 1) … downwards."""
    around = [(y, x) for y in range(RADIUS + 1) for x in range(-RADIUS, RADIUS + 1) if y > 0 or x > 0]
    return [(y, x) for y, x in around if hypot(y, x) <= RADIUS]


def _path(down: int, right: int) -> list[tuple[int, int]]:
    """Cells on the straight line from (0, 0) to (down, right), both ends included."""
    steps = max(down, abs(right))
    return [(round(down * i / steps), round(right * i / steps)) for i in range(steps + 1)]


def _between(length: int, step: int, cells: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For each pixel: the cell whose centre lies before it, and how far on it is to the next, in [0, 1)."""
    place = np.clip((np.arange(length) + 0.5) / step - 0.5, 0, cells - 1)
    before = place.astype(np.intp)
    return before, (place - before).astype(np.float32)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Bounding box with one more pixel around, where there is one; empty for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(0), slice(0)
    return slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)


def _block_means(mask: NDArray[np.bool_], step: int) -> NDArray[np.float32]:
    """Share of each step × step block that lies in the mask; blocks at the rim are smaller."""
    picture = PIL.Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(picture.reduce(step), np.float32) / np.float32(255)
