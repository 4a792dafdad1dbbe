"""Masks that become one: those with most of their pixels in common, and neighbours that no edge keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

from trace_sdk.instances.hierarchy import components
from trace_sdk.instances.outlines import box_of, middle_level
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
    """A mask bool [H, W], its score, and the indices of the masks that it came from, ascending."""

    mask: NDArray[np.bool_]
    score: float
    sources: list[int]


def join_alike(masks: Sequence[Candidate]) -> list[Candidate]:
    """While any two masks have IoU > SAME, all that hang together so become one, at once: in no order."""
    found = list(masks)
    while len(found) > 1:
        runs = [codec.encode(np.asfortranarray(one.mask, np.uint8)) for one in found]
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
    found = list(masks)
    while links := _links(found, probability, regions):
        # Each mask with its best neighbour, if it is that one's best, too.
        best: dict[int, tuple[float, int]] = {}
        for evidence, here, there in links:
            for one, other in ((here, there), (there, here)):
                best[one] = max(best.get(one, (0.0, -1)), (evidence, other))
        mutual = [(one, other) for one, (_, other) in best.items() if one < other and best[other][1] == one]
        found = _joined(found, np.array(mutual, np.int32))
    return found


def _links(
    masks: Sequence[Candidate], probability: NDArray[np.float32], regions: Regions
) -> list[tuple[float, int, int]]:
    """Neighbours that are one thing, and the evidence for it."""
    boxes = [box_of(one.mask, REACH + 1) for one in masks]
    held = [
        np.bincount(regions.labels[box][one.mask[box]], minlength=len(regions.areas))
        for one, box in zip(masks, boxes, strict=True)
    ]
    areas = [int(shares.sum()) for shares in held]
    links = []
    for here, (rows, columns) in enumerate(boxes):
        for there in range(here):
            down, aside = boxes[there]
            if rows.start >= down.stop or down.start >= rows.stop:
                continue
            if columns.start >= aside.stop or aside.start >= columns.stop:
                continue
            if min(areas[here], areas[there]) < PEER * max(areas[here], areas[there]):
                continue
            both = (
                slice(min(rows.start, down.start), max(rows.stop, down.stop)),
                slice(min(columns.start, aside.start), max(columns.stop, aside.stop)),
            )
            a, b, edges = masks[here].mask[both], masks[there].mask[both], probability[both]
            common = int(np.count_nonzero(a & b))
            if common > APART * (areas[here] + areas[there] - common):
                continue
            line = _grown(a) & _grown(b)
            # Between masks that touch, the line is 2 · REACH pixels wide.
            if np.count_nonzero(line) < 2 * REACH * SHARED * min(areas[here], areas[there]) ** 0.5:
                continue
            weakness = 1 - float(edges[line].mean()) / max(middle_level(a | b, edges), 1e-6)
            alike = float(np.minimum(held[here] / areas[here], held[there] / areas[there]).sum())
            if weakness + TOGETHER * alike >= JOIN:
                links.append((weakness + TOGETHER * alike, here, there))
    return links


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
        members = [masks[i] for i in np.flatnonzero(group == number)]
        if len(members) == 1:
            joined += members
            continue
        union = np.logical_or.reduce([one.mask for one in members])
        sources = sorted({index for one in members for index in one.sources})
        joined.append(Candidate(union, max(one.score for one in members), sources))
    return joined
