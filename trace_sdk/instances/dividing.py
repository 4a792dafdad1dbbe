"""Masks that may be two things, and what each of both would be.

On photos a line between two things is no stronger than one inside of one; their shape tells more. What touches leaves a
neck with concave corners at its ends. So the relief of a mask is made of its edges and of what lies near its outline;
the watershed of that, its pieces merged weakest line first, has the lines that may divide it, and the likeliest counts.
It is wrong often, so no mask gives way: its sides are added, with a lower score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, label, uniform_filter

from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.hierarchy import block_maxima, find_minima, merge_tree, merge_weakest_first
from trace_sdk.instances.joining import Candidate
from trace_sdk.instances.outlines import QUIET, log_odds
from trace_sdk.instances.watershed import watershed

CELLS = 40  # longest side of the grid on which a mask is looked at
SIDE = 0.08  # share of the mask that each side of a line has
SHAPE = 0.3  # height of the relief at the outline, above the mask's innermost cell, to an edge of probability 1
LEVELS = 50  # minima of the relief differ by 1/50
CORNER = 7  # side of the square in which the share of the mask says how concave its outline is, cells
# Log-odds of two things to one, for each of what a line has.
NECK = -1.0  # log of its length to the diameter of a disc like the smaller side
BALANCE = 1.5  # log of the smaller side's share of the mask
CONCAVE = 12.0  # share of the mask around its ends, half on a straight outline
EDGE = 0.75  # log-odds of the edge probability on it, above those inside the mask
ONE = 13.5  # and what speaks for one thing in any case
LIKELY = 0.003  # chance of two things from which both sides are given


@dataclass(frozen=True, eq=False)
class Division:
    """What lies on both sides of the likeliest line through a mask, and the chance that it is two, in (0, 1)."""

    sides: tuple[BoxedMask, BoxedMask]
    chance: float


def with_sides(masks: Sequence[Candidate], probability: NDArray[np.float32]) -> list[Candidate]:
    """The masks of a picture, and both sides of those that may be two.

    Such a mask's score is multiplied by the chance that it is one; a side has the mask's score times the chance that it
    is two, times the IoU of side and mask.
    """
    found = []
    for one, division in zip(masks, divisions([one.mask for one in masks], probability), strict=True):
        if division is None:
            found.append(one)
            continue
        found.append(replace(one, score=one.score * (1 - division.chance)))
        for side in division.sides:
            score = one.score * division.chance * side.area / one.mask.area
            found.append(replace(one, mask=side, score=score, side=True))
    return found


def divisions(masks: Sequence[BoxedMask], probability: NDArray[np.float32]) -> list[Division | None]:
    """Of each mask the likeliest line; None where its chance is under LIKELY, or there is none.

    All masks lie on one sheet, each on a grid of its own, so that each step is taken once for all. What is summed up
    over several borders are whole numbers: the order of the masks does not matter.
    """
    answer: list[Division | None] = [None] * len(masks)
    if not masks:
        return answer
    steps = [-(-max(mask.inside.shape) // CELLS) for mask in masks]
    inside, edges = _sheet(masks, steps, probability)
    pieces, relief = _cut(inside, edges)
    inside = pieces >= 0
    count = int(pieces.max()) + 1
    if count == 0:
        return answer
    areas: NDArray[np.int64] = np.bincount(pieces[inside], minlength=count)
    owners = np.zeros(count, np.intp)
    owners[pieces[inside]] = np.flatnonzero(inside) // inside[0].size
    wholes: NDArray[np.float64] = np.bincount(owners, areas, len(masks)).astype(np.float64)
    core = _around(inside, 3) == 9
    pairs, heights, figures = _borders(edges, relief, pieces, inside & ~core)
    sides = _sides(pairs, figures[:, 0], heights, areas, wholes[owners])
    owner = owners[sides.argmax(axis=1)]
    length, strength, ends, around = ((sides[:, pairs[:, 0]] != sides[:, pairs[:, 1]]) @ figures).T
    area, whole = sides @ areas, wholes[owner]
    smaller = np.minimum(area, whole - area)
    calm = (edges * core).sum(axis=(1, 2)) / np.maximum(core.sum(axis=(1, 2)), 1)
    odds = (
        NECK * np.log(length / np.sqrt(4 / np.pi * smaller))
        + BALANCE * np.log(smaller / whole)
        + CONCAVE * around / np.maximum(ends, 1) / CORNER**2
        + EDGE * (_log_odds(strength / length) - _log_odds(calm)[owner])
        - ONE
    )
    chances = 1 / (1 + np.exp(-odds))
    order = np.argsort(odds, kind="stable")
    # Of each mask the last one counts, which is its likeliest.
    for place, line in dict(zip(owner[order].tolist(), order.tolist(), strict=True)).items():
        if chances[line] < LIKELY:
            continue
        mask, step = masks[place], steps[place]
        # A pixel near the outline whose cell is outside belongs where the nearest cell of the mask does.
        nearest = distance_transform_edt(~inside[place], return_distances=False, return_indices=True)
        cells = sides[line].take(pieces[place][tuple(nearest)])[1:-1, 1:-1]
        side = cells.repeat(step, axis=0).repeat(step, axis=1)[tuple(slice(length) for length in mask.inside.shape)]
        corner = mask.box[0].start, mask.box[1].start
        both = BoxedMask.of(mask.inside & side, corner), BoxedMask.of(mask.inside & ~side, corner)
        answer[place] = Division(both, float(chances[line]))
    return answer


def _sheet(
    masks: Sequence[BoxedMask], steps: Sequence[int], probability: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Each mask and its edges, 0 to 255, on cells of step × step pixels with an empty frame: [K, h, w]."""
    inside = np.zeros((len(masks), CELLS + 2, CELLS + 2), np.bool_)
    edges = np.zeros(inside.shape, np.int32)
    for place, (mask, step) in enumerate(zip(masks, steps, strict=True)):
        middles = [np.minimum(np.arange(0, length, step) + step // 2, length - 1) for length in mask.inside.shape]
        cells = np.s_[place, 1 : len(middles[0]) + 1, 1 : len(middles[1]) + 1]
        inside[cells] = mask.inside[np.ix_(*middles)]
        edges[cells] = np.rint(255 * block_maxima(probability[mask.box], step))
    return inside, edges


def _cut(inside: NDArray[np.bool_], edges: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Pieces of the relief of each mask, int32 [K, h, w] from 0, -1 outside, and the relief, float32 [K, h, w]."""
    shape, flat = inside.shape, (-1, inside.shape[2])
    depth = distance_transform_edt(inside.reshape(flat)).reshape(shape)
    innermost = np.maximum(depth.max(axis=(1, 2), keepdims=True), 1)
    relief = np.where(inside, edges / 255 + SHAPE * (1 - depth / innermost), _WALL).astype(np.float32)
    smooth: NDArray[np.float32] = np.where(inside, gaussian_filter(relief, (0, 1, 1)), _WALL).astype(np.float32)
    minima = find_minima(np.rint(LEVELS * smooth).astype(np.uint8).reshape(flat)) & inside.reshape(flat)
    markers, count = label(minima)
    # What lies around floods nothing but parts that touch the rest by a corner and have no minimum.
    outside, _ = label(~inside.reshape(flat))
    markers += np.where(outside > 0, outside + count, 0)
    pieces = watershed((relief + _FLAT * smooth).reshape(flat), markers).reshape(shape) - 1
    return np.where(pieces < count, pieces, -1), relief


def _borders(
    edges: NDArray[np.int32], relief: NDArray[np.float32], pieces: NDArray[np.int32], rim: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Neighbouring pieces, int32 [M, 2], the relief summed over the cell pairs along their border, and figures [M, 4].

    Figures: how many cell pairs, their edges summed up, how many of them at the rim of the mask, and for these the
    mask's cells in the square around.
    """
    inside, count = pieces >= 0, int(pieces.max()) + 1
    around = _around(inside, CORNER)
    codes, values = [], []
    for here, there in (np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, :, :-1], np.s_[:, :, 1:]):
        apart = np.flatnonzero(inside[here] & inside[there] & (pieces[here] != pieces[there]))
        one, other = pieces[here].take(apart), pieces[there].take(apart)
        codes.append(np.minimum(one, other).astype(np.int64) * count + np.maximum(one, other))
        high, strong, square = (
            np.maximum(of[here].take(apart), of[there].take(apart)) for of in (relief, edges, around)
        )
        end = rim[here].take(apart) | rim[there].take(apart)
        values.append([high, np.ones(len(apart)), strong, end, end * square])
    code, border = np.unique(np.concatenate(codes), return_inverse=True)
    totals = (np.bincount(border, np.concatenate(of).astype(np.float64), len(code)) for of in zip(*values, strict=True))
    sums: NDArray[np.float64] = np.stack([*totals], axis=1)
    return np.stack(np.divmod(code, count), axis=1).astype(np.int32), sums[:, 0], sums[:, 1:]


def _sides(
    pairs: NDArray[np.int32],
    lengths: NDArray[np.float64],
    heights: NDArray[np.float64],
    areas: NDArray[np.int64],
    wholes: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """The pieces on one side of each line, bool [S, P]: what merges, if both it and the rest of its mask are a SIDE.

    areas: of the pieces. wholes: of the mask of each piece.
    """
    count = len(areas)
    joins, members = merge_tree(count, merge_weakest_first(count, pairs, lengths, heights)[0])
    sides = members[joins.ravel()]
    share = (sides @ areas) / wholes[sides.argmax(axis=1)]
    kept: NDArray[np.bool_] = sides[(share >= SIDE) & (share <= 1 - SIDE)]
    return kept


def _around(inside: NDArray[np.bool_], side: int) -> NDArray[np.int32]:
    """How many cells of the mask lie in the square around each, int32 [K, h, w]."""
    share = uniform_filter(inside.astype(np.float32), (0, side, side), mode="constant")
    cells: NDArray[np.int32] = np.rint(side * side * share).astype(np.int32)
    return cells


def _log_odds(strength: NDArray[np.float64]) -> NDArray[np.float64]:
    return log_odds(np.maximum(strength / 255, QUIET))


_WALL = np.float32(2)  # around a mask, above any relief
_FLAT = np.float32(1e-3)  # of the smoothed relief, says which way flat ground falls
