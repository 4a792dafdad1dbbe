"""Masks that become one: those with most of their pixels in common, and neighbours that no edge keeps apart.

Whether two touching masks are one thing cannot be told from their line alone: a quarter of the lines between things are
no clearer than half of those through the middle of one. So the lines of a picture are judged together. Some share of
the touching pairs are one thing; each pair's evidence says how likely it is with either; the share is the one most
likely for all of them (EM, from a prior under which it is small). Masks that come in pieces have many lines without an
edge, which raises the share and joins them; between good masks it stays low, and only a line far weaker than what is
around it joins two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

from trace_sdk.instances.boxed import Box, BoxedMask, union, widened
from trace_sdk.instances.components import components
from trace_sdk.instances.outlines import SHARED, border_evidence, line_between

SAME = 0.5  # IoU above which two masks are one
STEEP = 4.0  # how fast the log-likelihood of one thing to two falls with the evidence, from 0 where that is 0
MOST = 2.0  # and how far one line may raise the share, or lower a score: none is proof
PRIOR = (0.3, 8.0)  # pairs that are one thing, and that are two, before any is seen (a beta distribution)
ROUNDS = 50  # of EM
APART = 0.2  # IoU from which masks overlap rather than touch
PEER = 0.25  # area of the smaller to the larger from which they can be parts of one
REACH = 1  # pixels beside a mask that it touches


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mask of a picture of `shape`, its score, and the indices of the masks that it came from, ascending.

    side: given beside the whole that it is a side of, see `dividing`.
    """

    mask: BoxedMask
    score: float
    sources: list[int]
    shape: tuple[int, int]
    side: bool = False

    @cached_property
    def rle(self) -> dict[str, Any]:
        """COCO RLE with counts as bytes."""
        return self.mask.rle(self.shape)


def join_masks(masks: Sequence[Candidate], probability: NDArray[np.float32]) -> list[Candidate]:
    """Masks that are one thing become one: alike ones, then the best neighbours, and so on until none are left."""
    found = list(masks)
    known: dict[tuple[Candidate, Candidate], float] = {}
    limit: float | None = None
    while True:
        found = _join_alike(found)
        pairs = _touching(found, probability, known)
        if limit is None:
            # What is joined later leaves mostly borders behind, which say nothing about the masks as given.
            limit = _limit(np.array([evidence for evidence, _, _ in pairs]))
        links = _best_of(pairs, limit)
        if not len(links):
            return _doubted(found, pairs, limit)
        found = _joined(found, links)


def _doubted(masks: list[Candidate], pairs: Sequence[tuple[float, int, int]], limit: float) -> list[Candidate]:
    """Each score times the chance that the mask is whole: that it is not one thing with the likeliest neighbour."""
    least = [inf] * len(masks)
    for evidence, *places in pairs:
        for place in places:
            least[place] = min(least[place], evidence)
    return [
        replace(one, score=one.score / (1 + float(np.exp(min(MOST, STEEP * (limit - evidence))))))
        for one, evidence in zip(masks, least, strict=True)
    ]


def _limit(evidence: NDArray[np.float64]) -> float:
    """Evidence of a border under which a pair is more likely one thing than two, given that of all pairs, [P]."""
    ratio = np.sort(np.clip(-STEEP * evidence, -MOST, MOST))  # sums are the same in any order of masks
    one, two = PRIOR
    share = one / (one + two)
    for _ in range(ROUNDS):
        likely = 1 / (1 + np.exp(-ratio) * (1 - share) / share)
        share = (likely.sum() + one) / (len(evidence) + one + two)
    return float(-np.log((1 - share) / share) / STEEP)


def _join_alike(masks: list[Candidate]) -> list[Candidate]:
    """While any two masks have IoU > SAME, all that hang together so become one, at once: in no order."""
    found = masks
    while len(found) > 1:
        runs = [one.rle for one in found]
        alike = np.argwhere(np.triu(codec.iou(runs, runs, [0] * len(runs)) > SAME, 1)).astype(np.int32)
        if not len(alike):
            break
        found = _joined(found, alike)
    return found


def _touching(
    masks: Sequence[Candidate],
    probability: NDArray[np.float32],
    known: dict[tuple[Candidate, Candidate], float],
) -> list[tuple[float, int, int]]:
    """Pairs of touching masks that may be parts of one thing: evidence of a border between them, and their places.

    A small thing on a large one stays, see PEER. known: evidence of the pairs met before.
    """
    boxes = [widened(one.mask.box, REACH + 1, one.shape) for one in masks]
    starts, stops = (
        np.array([[getattr(side, end) for side in box] for box in boxes]).reshape(-1, 2) for end in ("start", "stop")
    )
    areas = np.array([one.mask.area for one in masks])
    near = (starts[:, None] < stops).all(axis=2) & (starts < stops[:, None]).all(axis=2)
    peers = np.minimum.outer(areas, areas) >= PEER * np.maximum.outer(areas, areas)
    pairs = []
    for here, there in np.argwhere(np.triu(near & peers, 1)).tolist():
        pair = masks[here], masks[there]
        if pair not in known:
            known[pair] = _evidence(*pair, union([boxes[here], boxes[there]]), probability)
        if known[pair] < inf:
            pairs.append((known[pair], here, there))
    return pairs


def _best_of(pairs: Sequence[tuple[float, int, int]], limit: float) -> NDArray[np.int32]:
    """Of the pairs with evidence under `limit` those that are each other's best, int32 [L, 2]."""
    best: dict[int, float] = {}
    for evidence, *places in pairs:
        for place in places:
            best[place] = min(best.get(place, limit), evidence)
    mutual = [(here, there) for evidence, here, there in pairs if evidence == best[here] == best[there]]
    return np.array(mutual, np.int32).reshape(-1, 2)


def _evidence(one: Candidate, other: Candidate, box: Box, probability: NDArray[np.float32]) -> float:
    """Of a border between two masks in a box; inf where they don't touch as parts of one thing do."""
    a, b = one.mask.within(box), other.mask.within(box)
    small, large = sorted((one.mask.area, other.mask.area))
    common = int(np.count_nonzero(a & b))
    if common > APART * (small + large - common):
        return inf
    line = line_between(a, b)
    # Between masks that touch, the line is two pixels wide.
    if np.count_nonzero(line) < 2 * SHARED * small**0.5:
        return inf
    return border_evidence(a | b, line, probability[box])


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
