"""Background-Guided Propagation (paper section 3.5): masks of others, made to agree with the edges.

1. Regions. The picture is cut with the edges as separators (`EdgeMap.instances`). What a mask has in a region is a
   fragment (`splitting`: which regions count, and whether a line between them, or a gap, makes the mask two).
2. Walk. Each fragment is spread by a random walk that stays in its region (`affinity`, `walk`); the rest of the region
   is the background.
3. Acceptance. The mask without its holes, the mask snapped to ridges nearby (`snapping`), the whole regions and what
   the walk reaches are proposals. Edges are wrong often, so the mask stays as it was but for those parts of a proposal
   that lie on stronger edges than what they replace (`outlines`), the less so the looser the masks of the picture are;
   of the proposals the one that gains most.
4. Joining. Masks with IoU > 0.5 become one until no two have it, and so do neighbours that are more likely one
   thing than two, given how many of the picture's are (`joining`).
5. Sides. What may be two things all the same is given as both as well, with lower scores (`dividing`).

The answer does not depend on the order of the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

from trace_sdk.instances.boxed import Box, BoxedMask, seen_from, union, widened
from trace_sdk.instances.dividing import with_sides
from trace_sdk.instances.hierarchy import Hierarchy, enlarge
from trace_sdk.instances.joining import Candidate, join_masks
from trace_sdk.instances.outlines import QUIET, Strengths, better_parts, log_odds, without_holes
from trace_sdk.instances.snapping import above_surroundings, evidence_needed, snap
from trace_sdk.instances.splitting import cut_at_gaps, nearest_seeds, split_masks
from trace_sdk.instances.walk import Fragment, Regions, spread_fragments

LEVEL = 0.5  # between the lowest share of the mask in the region (0) and the highest (1)
ALIKE = 0.4  # IoU of a new outline with the old one


@dataclass(frozen=True, eq=False, repr=False)
class RefinedMasks:
    """Masks after propagation, best score first; where scores are equal, in an order of their own shape.

    Attributes:
        rle: each mask as COCO RLE with counts as bytes, K of them, as pycocotools takes them.
        scores: float64 [K]: score of the mask it came from times IoU of the result with that mask (with its part, where
            a gap divides it), of joined ones the highest; times the chance that it is whole, see `joining`, and that it
            is one; that of a side see `dividing`.
        sources: for each, the indices of the masks it came from, ascending; of a side, those of its mask.
        sides: bool [K], which are a side of another one of them that may be two. Without these no two are alike.
        shape: height and width of the picture.
    """

    rle: list[dict[str, Any]]
    scores: NDArray[np.float64]
    sources: list[list[int]]
    sides: NDArray[np.bool_]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rle)

    def __repr__(self) -> str:
        height, width = self.shape
        sides = np.count_nonzero(self.sides)
        return f"RefinedMasks({len(self) - sides} and {sides} sides in {width}x{height})"

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
    pieces = enlarge(hierarchy.pieces, probability.shape, hierarchy.step)
    regions = Regions(of_piece.take(pieces))
    height, width = probability.shape
    cut = [(index, part) for index, mask in enumerate(masks) for part in cut_at_gaps(BoxedMask.of(mask), probability)]
    given = [part for _, part in cut]
    fragments = split_masks(probability, regions, given)
    rises = spread_fragments(probability, regions, given, fragments, LEVEL)
    instances: list[dict[int, list[int]]] = [{} for _ in given]
    for place, fragment in enumerate(fragments):
        instances[fragment.mask].setdefault(fragment.instance, []).append(place)
    odds = log_odds(np.maximum(probability, QUIET)).astype(np.float32)
    drafts = []
    for (index, mask), own in zip(cut, instances, strict=True):
        filled = BoxedMask(mask.box, without_holes(mask.inside))
        # A mask without a region that counts stays as it was, but for its holes.
        groups = list(own.values()) or [[]]
        for part, places in zip(_parts(mask, regions, fragments, groups), groups, strict=True):
            closed, strengths = _closed(part, filled, probability)
            walked = [(fragments[place].region, *rises[place]) for place in places]
            drafts.append(_Draft(index, mask, closed, strengths, snap(closed, pieces), walked))
    needed = evidence_needed([above_surroundings(one.closed, one.snapped, odds) for one in drafts])
    found = []
    for one in drafts:
        best = _best(one, probability, regions, needed)
        common = np.count_nonzero(best.within(one.given.box) & one.given.inside)
        agreement = common / (best.area + one.given.area - common)
        found.append(Candidate(best, float(scores[one.source] * agreement), [one.source], (height, width)))
    joined = with_sides(join_masks(found, probability), probability)
    runs = [one.rle for one in joined]
    order = sorted(range(len(runs)), key=lambda i: (-joined[i].score, runs[i]["counts"]))
    return RefinedMasks(
        [runs[i] for i in order],
        np.array([joined[i].score for i in order]),
        [joined[i].sources for i in order],
        np.array([joined[i].side for i in order], np.bool_),
        (height, width),
    )


@dataclass(frozen=True, eq=False)
class _Draft:
    """A mask on its way.

    Attributes:
        source: index of the mask as it came.
        given: that, or its part beside a gap.
        closed: of that one thing, holes closed. strengths: of `closed`.
        snapped: see `snap`.
        walked: of the fragments, their region and their rise.
    """

    source: int
    given: BoxedMask
    closed: BoxedMask
    strengths: Strengths
    snapped: BoxedMask
    walked: list[tuple[int, Box, NDArray[np.float32]]]


def _closed(part: BoxedMask, filled: BoxedMask, probability: NDArray[np.float32]) -> tuple[BoxedMask, Strengths]:
    """Part of a mask with those of its holes closed that no edge surrounds. filled: the mask without any."""
    box = widened(filled.box, 1, probability.shape)
    given, edges = part.within(box), probability[box]
    closed, _ = better_parts(given, given | filled.within(box), edges, Strengths.of(given, edges))
    return BoxedMask.of(closed, (box[0].start, box[1].start)), Strengths.of(closed, edges)


def _best(draft: _Draft, probability: NDArray[np.float32], regions: Regions, needed: float) -> BoxedMask:
    """Of the outlines that pieces, regions and walk suggest, the one that gains most. needed: see `better_parts`."""
    best, most = draft.closed, 0.0
    for after in _proposals(draft, regions):
        box = widened(union([draft.closed.box, after.box]), 1, probability.shape)
        before, proposal = draft.closed.within(box), after.within(box)
        if np.count_nonzero(proposal & before) >= ALIKE * np.count_nonzero(proposal | before):
            changed, gain = better_parts(before, proposal, probability[box], draft.strengths, needed)
            if gain > most:
                best, most = BoxedMask.of(changed, (box[0].start, box[1].start)), gain
    return best


def _proposals(draft: _Draft, regions: Regions) -> Iterator[BoxedMask]:
    """The snapped mask, its regions if they are of like size, and where the walk reaches LEVEL in them."""
    yield draft.snapped
    if not draft.walked:
        return
    numbers = [region for region, _, _ in draft.walked]
    sizes = int(regions.areas[numbers].sum()), draft.closed.area
    if min(sizes) >= ALIKE * max(sizes):
        box = union([regions.boxes[region] for region in numbers])
        yield BoxedMask(box, np.isin(regions.labels[box], numbers))
    box = union([own for _, own, _ in draft.walked])
    reached = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), np.bool_)
    for _, own, rise in draft.walked:
        # Regions don't overlap, their boxes do.
        reached[seen_from(box, own)] |= rise > LEVEL
    yield BoxedMask.of(reached, (box[0].start, box[1].start))


def _parts(
    mask: BoxedMask, regions: Regions, fragments: Sequence[Fragment], instances: Sequence[Sequence[int]]
) -> list[BoxedMask]:
    """The mask cut into its instances; what lies in regions that don't count goes to the nearest one."""
    if len(instances) == 1:
        return [mask]
    number_of = np.zeros(len(regions.areas), np.int32)
    for number, places in enumerate(instances, start=1):
        number_of[[fragments[place].region for place in places]] = number
    return nearest_seeds(mask, np.where(mask.inside, number_of[regions.labels[mask.box]], 0))
