"""Which regions of the picture a mask is made of, and whether they are one thing or several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, label

from trace_sdk.instances.boxed import BoxedMask, widened
from trace_sdk.instances.components import components
from trace_sdk.instances.hierarchy import find_borders, merge_tree, merge_weakest_first
from trace_sdk.instances.outlines import SHARED, border_evidence, line_between
from trace_sdk.instances.walk import Fragment, Regions

SPLIT = 0.2  # share of a mask that makes a part an instance of its own
BORDER = 3.0  # evidence of a border, see `outlines.border_evidence`, from which a mask is two
CRACK = 0.0  # evidence of a border from which a gap is between two things
GAP = 3  # how far the parts beside a gap are grown to meet, pixels


def cut_at_gaps(mask: BoxedMask, probability: NDArray[np.float32]) -> list[BoxedMask]:
    """The mask in its unconnected parts, where a narrow gap between them looks like a border more than not.

    A gap that an edge lies in is what a method left between two things; one without an edge is a crack in one thing;
    a wide one is what lies in front of it. Parts with less than SPLIT of the mask go with the nearest.
    """
    parts, count = label(mask.inside)
    if count < 2:
        return [mask]
    areas = np.bincount(parts.ravel())[1:]
    large = np.flatnonzero(areas >= SPLIT * mask.area) + 1
    if len(large) < 2:
        return [mask]
    box = widened(mask.box, GAP, probability.shape)
    edges = probability[box]
    sides = [BoxedMask(mask.box, parts == number).within(box) for number in large]
    grown = [binary_dilation(side, iterations=GAP) for side in sides]
    one = []
    for a, b in combinations(range(len(large)), 2):
        line = grown[a] & grown[b]
        short = np.count_nonzero(line) < 2 * SHARED * min(areas[large[[a, b]] - 1]) ** 0.5
        if short or border_evidence(sides[a] | sides[b], line, edges) <= CRACK:
            one.append((a, b))
    thing = components(np.array(one, np.int32).reshape(-1, 2), len(large))
    if thing.max() == 0:
        return [mask]
    seeds = np.zeros(count + 1, np.int32)
    seeds[large] = thing + 1
    return nearest_seeds(mask, seeds[parts])


def nearest_seeds(mask: BoxedMask, seeds: NDArray[np.int32]) -> list[BoxedMask]:
    """The mask cut into what is nearest to each of its seeds, int32 as large as its box, 1 … N, 0 elsewhere."""
    y, x = distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    nearest = np.where(mask.inside, seeds[y, x], 0)
    corner = mask.box[0].start, mask.box[1].start
    return [BoxedMask.of(nearest == number, corner) for number in range(1, int(seeds.max()) + 1)]


def split_masks(probability: NDArray[np.float32], regions: Regions, masks: Sequence[BoxedMask]) -> list[Fragment]:
    """Which regions of each mask count, and as which of its instances.

    A region counts if half of it lies in the mask, or half of the mask in it; the rest is a loose border. Regions are
    joined, the weakest border inside the mask first. Going back from the whole, a join is undone if both its sides have
    SPLIT of the mask and the line between them is a BORDER. A side with less than SPLIT goes with the other.
    """
    count = len(regions.areas)
    fragments = []
    for index, mask in enumerate(masks):
        box = widened(mask.box, 1, probability.shape)
        own, labels, edges = mask.within(box), regions.labels[box], probability[box]
        held = np.bincount(labels[own], minlength=count)
        chosen = np.flatnonzero((2 * held >= np.minimum(regions.areas, held.sum())) & (held > 0))
        instances = np.zeros(len(chosen), np.int32)
        if len(chosen) > 1:
            number = np.full(count, -1, np.int32)
            number[chosen] = np.arange(len(chosen), dtype=np.int32)
            parts = np.where(own & (number[labels] >= 0), number[labels], np.int32(len(chosen)))
            borders, lengths, totals = find_borders(parts, edges)
            inner = (borders < len(chosen)).all(axis=1)
            instances = _split(len(chosen), parts, edges, borders[inner], lengths[inner], totals[inner])
        fragments += [
            Fragment(index, int(region), int(instance), float(held[region] / regions.areas[region]))
            for region, instance in zip(chosen, instances, strict=True)
        ]
    return fragments


def _split(
    count: int,
    parts: NDArray[np.int32],
    edges: NDArray[np.float32],
    borders: NDArray[np.int32],
    lengths: NDArray[np.float64],
    totals: NDArray[np.float64],
) -> NDArray[np.int32]:
    """Instance of each of `count` regions, int32 [R] from 0. `parts`: region of each pixel, R outside of the mask."""
    areas = np.bincount(parts.ravel(), minlength=count + 1)[:count]
    merges, _ = merge_weakest_first(count, borders, lengths, totals)
    joins, members = merge_tree(count, merges)
    least = SPLIT * areas.sum()
    instances = np.zeros(count, np.int32)
    # Parts without a common border are one thing: no edge says otherwise.
    waiting = np.setdiff1d(np.arange(len(members)), joins).tolist()
    while waiting:
        group = waiting.pop()
        if group < count:
            continue
        smaller, larger = sorted(joins[group - count].tolist(), key=lambda side: areas[members[side]].sum())
        if areas[members[smaller]].sum() < least:
            waiting.append(larger)
            continue
        small, large = (np.append(members[side], False)[parts] for side in (smaller, larger))
        if border_evidence(small | large, line_between(small, large), edges) < BORDER:
            continue
        instances[members[smaller]] = instances.max() + 1
        waiting += [smaller, larger]
    return instances
