"""Masks that become one: those with most of their pixels in common, and neighbours that no edge keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

from trace_sdk.instances.boxed import Box, BoxedMask, overlap, union, widened
from trace_sdk.instances.hierarchy import components
from trace_sdk.instances.outlines import middle_level
from trace_sdk.instances.walk import Regions

SAME = 0.5  # IoU above which two masks are one
JOIN = 0.9  # evidence from which two masks are one, see `join_neighbours`
TOGETHER = 0.5  # what counts lying in the same regions, beside the weakness of the line between
SHARED = 0.5  # least length of such a line, to the side of the smaller mask
APART = 0.2  # IoU from which masks overlap rather than touch
PEER = 0.25  # area of the smaller to the larger from which they can be parts of one
REACH = 1  # pixels that touching masks may be apart, either way


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mask of a picture of `shape`, its score, and the indices of the masks that it came from, ascending."""

    mask: BoxedMask
    score: float
    sources: list[int]
    shape: tuple[int, int]

    @cached_property
    def rle(self) -> dict[str, Any]:
        """COCO RLE with counts as bytes."""
        return self.mask.rle(self.shape)


def join_masks(masks: Sequence[Candidate], probability: NDArray[np.float32], regions: Regions) -> list[Candidate]:
    """Alike ones, then neighbours, and again while neighbours that became one are like another mask."""
    found = list(masks)
    while True:
        joined = join_neighbours(join_alike(found), probability, regions)
        if len(joined) == len(found):
            return joined
        found = joined


def join_alike(masks: Sequence[Candidate]) -> list[Candidate]:
    """While any two masks have IoU > SAME, all that hang together so become one, at once: in no order."""
    found = list(masks)
    while len(found) > 1:
        runs = [one.rle for one in found]
        alike = np.argwhere(np.triu(codec.iou(runs, runs, [0] * len(runs)) > SAME, 1)).astype(np.int32)
        if not len(alike):
            break
        found = _joined(found, alike)
    return found


def join_neighbours(masks: Sequence[Candidate], probability: NDArray[np.float32], regions: Regions) -> list[Candidate]:
    """Touching masks become one where nothing keeps them apart: the best such neighbours first, in no other order.

    The evidence is how much weaker the line between them is than the middle level (`outlines`) of both as one, as a
    share, and TOGETHER times how much they lie in the same regions (the sum over regions of the smaller share of the
    two masks). A small thing on a large one stays, see PEER.
    """
    found = [_Neighbour.of(one, regions) for one in masks]
    known: dict[tuple[_Neighbour, _Neighbour], float] = {}
    while True:
        links = []
        for place, one in enumerate(found):
            for before, other in enumerate(found[:place]):
                pair = one, other
                if pair not in known:
                    known[pair] = _evidence(one, other, probability)
                if known[pair] >= JOIN:
                    links.append((known[pair], place, before))
        if not links:
            return [one.candidate for one in found]
        # Those that are each other's best, equals among them.
        best: dict[int, float] = {}
        for evidence, here, there in links:
            for place in (here, there):
                best[place] = max(best.get(place, 0.0), evidence)
        mutual = [(here, there) for evidence, here, there in links if evidence == best[here] == best[there]]
        joined = _joined([one.candidate for one in found], np.array(mutual, np.int32))
        own = {one.candidate: one for one in found}
        found = [own[one] if one in own else _Neighbour.of(one, regions) for one in joined]


@dataclass(frozen=True, eq=False)
class _Neighbour:
    """A mask, its box with room to touch, and the share of it in each region."""

    candidate: Candidate
    box: Box
    shares: NDArray[np.float64]

    @classmethod
    def of(cls, candidate: Candidate, regions: Regions) -> _Neighbour:
        mask = candidate.mask
        held = np.bincount(regions.labels[mask.box][mask.inside], minlength=len(regions.areas))
        return cls(candidate, widened(mask.box, REACH + 1, regions.labels.shape), held / mask.area)


def _evidence(here: _Neighbour, there: _Neighbour, probability: NDArray[np.float32]) -> float:
    """That two masks are one thing; 0 where they don't touch as parts of one thing do."""
    small, large = sorted((here.candidate.mask.area, there.candidate.mask.area))
    if small < PEER * large or not all(side.stop > side.start for side in overlap(here.box, there.box)):
        return 0.0
    both = union([here.box, there.box])
    a, b, edges = here.candidate.mask.within(both), there.candidate.mask.within(both), probability[both]
    common = int(np.count_nonzero(a & b))
    if common > APART * (small + large - common):
        return 0.0
    line = _grown(a) & _grown(b)
    # Between masks that touch, the line is 2 · REACH pixels wide.
    if np.count_nonzero(line) < 2 * REACH * SHARED * small**0.5:
        return 0.0
    weakness = 1 - float(edges[line].mean()) / max(middle_level(a | b, edges), 1e-6)
    return weakness + TOGETHER * float(np.minimum(here.shares, there.shares).sum())


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the pixels beside it."""
    grown = mask.copy()
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        grown[here] |= mask[there]
        grown[there] |= mask[here]
    return grown


def _joined(masks: Sequence[Candidate], links: NDArray[np.int32]) -> list[Candidate]:
    group = components(links, len(masks))
    joined = []
    for number in range(int(group.max()) + 1):
        members = [masks[i] for i in np.flatnonzero(group == number).tolist()]
        if len(members) == 1:
            joined += members
            continue
        box = union([one.mask.box for one in members])
        whole = BoxedMask(box, np.logical_or.reduce([one.mask.within(box) for one in members]))
        sources = sorted({index for one in members for index in one.sources})
        joined.append(Candidate(whole, max(one.score for one in members), sources, members[0].shape))
    return joined
