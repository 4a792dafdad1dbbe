"""Background-Guided Propagation (paper section 3.5): masks of others, made to agree with the edges.

1. Regions. The picture is cut with the edges as separators (`EdgeMap.instances`). What a mask has in a region is a
   fragment (`splitting`: which regions count, and whether a line between them makes the mask two).
2. Walk. Each fragment is spread by a random walk that stays in its region (`affinity`, `walk`); the rest of the region
   is the background.
3. Acceptance. The whole regions, the walk's levels and the mask without its holes are proposals. Edges are wrong often,
   so the mask stays as it was but for those parts of a proposal that lie on stronger edges than what they replace
   (`outlines`); of the proposals the one that gains most.
4. Joining. Masks with IoU > 0.5 become one until no two have it, and so do neighbours that no edge keeps apart
   (`joining`).

The answer does not depend on the order of the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec
from scipy.ndimage import distance_transform_edt

from trace_sdk.instances.boxed import Box, BoxedMask, seen_from, union, widened
from trace_sdk.instances.hierarchy import Hierarchy, enlarge
from trace_sdk.instances.joining import Candidate, join_masks
from trace_sdk.instances.outlines import Strengths, better_parts, without_holes
from trace_sdk.instances.splitting import split_masks
from trace_sdk.instances.walk import Fragment, Regions, spread_fragments

LEVELS = (0.25, 0.5, 0.75)  # between the lowest share of the mask in the region (0) and the highest (1)
ALIKE = 0.4  # IoU of a new outline with the old one


@dataclass(frozen=True, eq=False)
class RefinedMasks:
    """Masks after propagation, best score first; where scores are equal, in an order of their own shape.

    Attributes:
        rle: each mask as COCO RLE with counts as bytes, K of them, as pycocotools takes them.
        scores: float64 [K]: score of the mask it came from times IoU of the result with that mask; of joined ones the
            highest.
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
    regions = Regions(enlarge(of_piece.take(hierarchy.pieces), probability.shape))
    height, width = probability.shape
    given = [BoxedMask.of(mask) for mask in masks]
    fragments = split_masks(probability, regions, given)
    rises = spread_fragments(probability, regions, given, fragments, LEVELS[0])
    instances: list[dict[int, list[int]]] = [{} for _ in given]
    for place, fragment in enumerate(fragments):
        instances[fragment.mask].setdefault(fragment.instance, []).append(place)
    found = []
    for index, mask in enumerate(given):
        # A mask without a region that counts stays as it was, but for its holes.
        own = list(instances[index].values()) or [[]]
        filled = BoxedMask(mask.box, without_holes(mask.inside))
        for part, places in zip(_parts(mask, regions, fragments, own), own, strict=True):
            best = _best(part, filled, probability, regions, [(fragments[i].region, *rises[i]) for i in places])
            common = np.count_nonzero(best.within(mask.box) & mask.inside)
            agreement = common / (best.area + mask.area - common)
            found.append(Candidate(best, float(scores[index] * agreement), [index], (height, width)))
    joined = join_masks(found, probability)
    runs = [one.rle for one in joined]
    order = sorted(range(len(runs)), key=lambda i: (-joined[i].score, runs[i]["counts"]))
    return RefinedMasks(
        [runs[i] for i in order],
        np.array([joined[i].score for i in order]),
        [joined[i].sources for i in order],
        (height, width),
    )


def _best(
    part: BoxedMask,
    filled: BoxedMask,
    probability: NDArray[np.float32],
    regions: Regions,
    rises: Sequence[tuple[int, Box, NDArray[np.float32]]],
) -> BoxedMask:
    """Of the outlines that the regions and the walk suggest, the one that gains most.

    Args:
        part: of a mask. filled: the mask without its holes. rises: of its fragments, their region and their rise.
    """
    box = widened(filled.box, 1, probability.shape)
    given, edges = part.within(box), probability[box]
    closed, _ = better_parts(given, given | filled.within(box), edges, Strengths.of(given, edges))
    strengths = Strengths.of(closed, edges)
    before = BoxedMask.of(closed, (box[0].start, box[1].start))
    best, most = before, 0.0
    for after in _proposals(before, regions, rises):
        box = widened(union([before.box, after.box]), 1, probability.shape)
        closed, proposal = before.within(box), after.within(box)
        if np.count_nonzero(proposal & closed) >= ALIKE * np.count_nonzero(proposal | closed):
            changed, gain = better_parts(closed, proposal, probability[box], strengths)
            if gain > most:
                best, most = BoxedMask.of(changed, (box[0].start, box[1].start)), gain
    return best


def _proposals(
    before: BoxedMask, regions: Regions, rises: Sequence[tuple[int, Box, NDArray[np.float32]]]
) -> Iterator[BoxedMask]:
    """The regions of a mask, and where the walk reaches each of LEVELS in them; those of no like size left out."""
    if not rises:
        return
    numbers = [region for region, _, _ in rises]
    area = int(regions.areas[numbers].sum())
    if min(area, before.area) >= ALIKE * max(area, before.area):
        box = union([regions.boxes[region] for region in numbers])
        yield BoxedMask(box, np.isin(regions.labels[box], numbers))
    box = union([own for _, own, _ in rises])
    rise = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), np.float32)
    for _, own, values in rises:
        # Regions don't overlap, their boxes do.
        window = rise[seen_from(box, own)]
        np.maximum(window, values, out=window)
    for level in LEVELS:
        yield BoxedMask.of(rise > level, (box[0].start, box[1].start))


def _parts(
    mask: BoxedMask, regions: Regions, fragments: Sequence[Fragment], instances: Sequence[Sequence[int]]
) -> list[BoxedMask]:
    """The mask cut into its instances; what lies in regions that don't count goes to the nearest one."""
    if len(instances) == 1:
        return [mask]
    number_of = np.zeros(len(regions.areas), np.int32)
    for number, places in enumerate(instances, start=1):
        number_of[[fragments[place].region for place in places]] = number
    seeds = np.where(mask.inside, number_of[regions.labels[mask.box]], 0)
    y, x = distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    nearest = np.where(mask.inside, seeds[y, x], 0)
    corner = mask.box[0].start, mask.box[1].start
    return [BoxedMask.of(nearest == number, corner) for number in range(1, len(instances) + 1)]
