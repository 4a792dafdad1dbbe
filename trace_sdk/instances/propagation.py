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

from trace_sdk.instances.hierarchy import Hierarchy, enlarge
from trace_sdk.instances.joining import Candidate, join_alike, join_neighbours
from trace_sdk.instances.outlines import better_parts, box_of, middle_level, without_holes
from trace_sdk.instances.splitting import split_masks
from trace_sdk.instances.walk import Box, Fragment, Regions, spread_fragments

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
    regions = Regions(enlarge(of_piece[hierarchy.pieces], probability.shape))
    fragments = split_masks(probability, regions, masks)
    rises = spread_fragments(probability, regions, masks, fragments)
    of_instance: dict[tuple[int, int], list[int]] = {}
    for place, fragment in enumerate(fragments):
        of_instance.setdefault((fragment.mask, fragment.instance), []).append(place)
    filled = without_holes(masks)
    areas = np.count_nonzero(masks, axis=(1, 2))
    found = []
    for index, mask in enumerate(masks):
        # A mask without a region that counts stays as it was, but for its holes.
        own = [places for (source, _), places in of_instance.items() if source == index] or [[]]
        for part, places in zip(_parts(mask, regions, fragments, own), own, strict=True):
            box = _union([box_of(part), *(regions.boxes[fragments[place].region] for place in places)], part.shape)
            edges = probability[box]
            whole_part = part[box] | (filled[index][box] & ~mask[box])
            closed, _ = better_parts(part[box], whole_part, edges, middle_level(part[box], edges))
            level = middle_level(closed, edges)
            best, most = closed, 0.0
            for proposal in _proposals(box, regions, [fragments[i] for i in places], [rises[i] for i in places]):
                if np.count_nonzero(proposal & closed) >= ALIKE * np.count_nonzero(proposal | closed):
                    changed, gain = better_parts(closed, proposal, edges, level)
                    if gain > most:
                        best, most = changed, gain
            whole = np.zeros_like(mask)
            whole[box] = best
            common = np.count_nonzero(best & mask[box])
            agreement = common / (np.count_nonzero(best) + areas[index] - common)
            found.append(Candidate(whole, float(scores[index] * agreement), [index]))
    joined = join_neighbours(join_alike(found), probability, regions)
    runs = [one.rle for one in joined]
    order = sorted(range(len(runs)), key=lambda i: (-joined[i].score, runs[i]["counts"]))
    height, width = probability.shape
    return RefinedMasks(
        [runs[i] for i in order],
        np.array([joined[i].score for i in order]),
        [joined[i].sources for i in order],
        (height, width),
    )


def _parts(
    mask: NDArray[np.bool_], regions: Regions, fragments: Sequence[Fragment], instances: Sequence[Sequence[int]]
) -> list[NDArray[np.bool_]]:
    """The mask cut into its instances; what lies in regions that don't count goes to the nearest one."""
    if len(instances) == 1:
        return [mask]
    box = box_of(mask)
    number_of = np.zeros(len(regions.areas), np.int32)
    for number, places in enumerate(instances, start=1):
        number_of[[fragments[place].region for place in places]] = number
    seeds = np.where(mask[box], number_of[regions.labels[box]], 0)
    y, x = distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    nearest = np.where(mask[box], seeds[y, x], 0)
    parts = []
    for number in range(1, len(instances) + 1):
        part = np.zeros_like(mask)
        part[box] = nearest == number
        parts.append(part)
    return parts


def _proposals(
    box: Box, regions: Regions, fragments: Sequence[Fragment], rises: Sequence[NDArray[np.float32]]
) -> Iterator[NDArray[np.bool_]]:
    """Outlines that the regions and the walk suggest, bool, as large as `box`."""
    shape = box[0].stop - box[0].start, box[1].stop - box[1].start
    rise = np.full(shape, -1, np.float32)
    for fragment, values in zip(fragments, rises, strict=True):
        rows, columns = own = regions.boxes[fragment.region]
        window = rise[
            rows.start - box[0].start : rows.stop - box[0].start,
            columns.start - box[1].start : columns.stop - box[1].start,
        ]
        np.copyto(window, values, where=regions.labels[own] == fragment.region)
    yield rise >= 0
    for level in LEVELS:
        yield rise > level


def _union(boxes: Sequence[Box], shape: tuple[int, ...]) -> Box:
    """The box around all, with one more pixel to see the edge on the outer side."""
    (top, left), (bottom, right) = (
        [function(getattr(box[axis], end) for box in boxes) for axis in (0, 1)]
        for function, end in ((min, "start"), (max, "stop"))
    )
    return slice(max(0, top - 1), min(shape[0], bottom + 1)), slice(max(0, left - 1), min(shape[1], right + 1))
