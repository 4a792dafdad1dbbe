"""Masks that become one: those with most of their pixels in common, and neighbours that no edge keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

from trace_sdk.instances.boxed import Box, BoxedMask, union, widened
from trace_sdk.instances.components import components
from trace_sdk.instances.outlines import border_evidence, line_between

SAME = 0.5  # IoU above which two masks are one
JOIN = -1.2  # evidence of a border, see `outlines.border_evidence`, up to which neighbours are one
SHARED = 0.5  # least length of such a line, to the side of the smaller mask
APART = 0.2  # IoU from which masks overlap rather than touch
PEER = 0.25  # area of the smaller to the larger from which they can be parts of one
REACH = 1  # pixels beside a mask that it touches


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


def join_masks(masks: Sequence[Candidate], probability: NDArray[np.float32]) -> list[Candidate]:
    """Masks that are one thing become one: alike ones, then the best neighbours, and so on until none are left."""
    found = list(masks)
    known: dict[tuple[Candidate, Candidate], float] = {}
    while True:
        found = _join_alike(found)
        links = _best_neighbours(found, probability, known)
        if not len(links):
            return found
        found = _joined(found, links)


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


def _best_neighbours(
    masks: Sequence[Candidate],
    probability: NDArray[np.float32],
    known: dict[tuple[Candidate, Candidate], float],
) -> NDArray[np.int32]:
    """Pairs of touching masks that nothing keeps apart, each the other's best, int32 [L, 2].

    A small thing on a large one stays, see PEER. known: evidence of a border of the pairs met before.
    """
    boxes = [widened(one.mask.box, REACH + 1, one.shape) for one in masks]
    starts, stops = (
        np.array([[getattr(side, end) for side in box] for box in boxes]).reshape(-1, 2) for end in ("start", "stop")
    )
    areas = np.array([one.mask.area for one in masks])
    near = (starts[:, None] < stops).all(axis=2) & (starts < stops[:, None]).all(axis=2)
    peers = np.minimum.outer(areas, areas) >= PEER * np.maximum.outer(areas, areas)
    links = []
    for here, there in np.argwhere(np.triu(near & peers, 1)).tolist():
        pair = masks[here], masks[there]
        if pair not in known:
            known[pair] = _evidence(*pair, union([boxes[here], boxes[there]]), probability)
        if known[pair] <= JOIN:
            links.append((known[pair], here, there))
    best: dict[int, float] = {}
    for evidence, here, there in links:
        for place in (here, there):
            best[place] = min(best.get(place, inf), evidence)
    mutual = [(here, there) for evidence, here, there in links if evidence == best[here] == best[there]]
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
