"""Which regions of the picture a mask is made of, and whether they are one thing or several."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from trace_sdk.instances.boxed import BoxedMask, widened
from trace_sdk.instances.hierarchy import find_borders, merge_weakest_first
from trace_sdk.instances.outlines import log_odds, middle_level
from trace_sdk.instances.walk import Fragment, Regions

SPLIT = 0.2  # share of a mask that makes a part an instance of its own
ODDS = 1.5  # log-odds of a line that splits a mask, above those of a middle line of the mask
NECK = 0.6  # what they must have more for each e-fold of the line's length to the side of the smaller part


def split_masks(probability: NDArray[np.float32], regions: Regions, masks: Sequence[BoxedMask]) -> list[Fragment]:
    """Which regions of each mask count, and as which of its instances.

    A region counts if half of it lies in the mask, or half of the mask in it; the rest is a loose border. Regions are
    joined, the weakest border inside the mask first. Going back from the whole, a join is undone if both its sides have
    SPLIT of the mask and the log-odds of the line between them are ODDS above those of the mask's middle level
    (`outlines`), more where the line is long beside what it cuts off. A side with less than SPLIT goes with the other.
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
            instances = _split(
                borders[inner], lengths[inner], totals[inner], held[chosen].astype(np.float64), middle_level(own, edges)
            )
        fragments += [
            Fragment(index, int(region), int(instance), float(held[region] / regions.areas[region]))
            for region, instance in zip(chosen, instances, strict=True)
        ]
    return fragments


def _split(
    borders: NDArray[np.int32],
    lengths: NDArray[np.float64],
    totals: NDArray[np.float64],
    areas: NDArray[np.float64],
    level: float,
) -> NDArray[np.int32]:
    """Instance of each region, int32 [R] from 0. `level`: the mask's middle level."""
    merges, _ = merge_weakest_first(len(areas), borders, lengths, totals)
    members: list[list[int]] = [[region] for region in range(len(areas))]
    of = list(range(len(areas)))  # the group that has a region
    joins: dict[int, tuple[int, int]] = {}
    for a, b in merges.tolist():
        joins[len(members)] = of[a], of[b]
        members.append(members[of[a]] + members[of[b]])
        for region in members[-1]:
            of[region] = len(members) - 1
    least = SPLIT * areas.sum()
    instances = np.zeros(len(areas), np.int32)
    # Parts without a common border are one thing: no edge says otherwise.
    waiting = sorted(set(of))
    while waiting:
        group = waiting.pop()
        if group not in joins:
            continue
        smaller, larger = sorted(joins[group], key=lambda side: areas[members[side]].sum())
        small, large = members[smaller], members[larger]
        if areas[small].sum() < least:
            waiting.append(larger)
            continue
        across = np.isin(borders, small).any(axis=1) & np.isin(borders, large).any(axis=1)
        length = lengths[across].sum()
        needed = log_odds(level) + ODDS + NECK * log(length / areas[small].sum() ** 0.5)
        if log_odds(totals[across].sum() / length) < needed:
            continue
        instances[small] = instances.max() + 1
        waiting += [smaller, larger]
    return instances
