from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import label

from trace_sdk.edge_map import EdgeMap
from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.dividing import divisions
from trace_sdk.instances.outlines import line_between
from trace_sdk.instances.propagation import RefinedMasks

HEIGHT, WIDTH = 80, 120


def disc(row: int, column: int, radius: int = 18) -> Any:
    y, x = np.indices((HEIGHT, WIDTH))
    return np.hypot(y - row, x - column) < radius


def around(*masks: Any, strength: float = 0.6) -> Any:
    """Edges along the outlines of masks."""
    edges = np.full((HEIGHT, WIDTH), 0.05, np.float32)
    for mask in masks:
        edges[line_between(mask, ~mask)] = strength
    return edges


DISCS = disc(40, 42), disc(40, 75)


def refined_by(edges: Any, mask: Any, score: float = 1.0) -> RefinedMasks:
    return EdgeMap(edges, np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5).refine(mask[None], [score])


def iou(a: Any, b: Any) -> float:
    return float(np.count_nonzero(a & b) / np.count_nonzero(a | b))


def test_touching_things_in_one_mask_are_given_beside_it() -> None:
    """Two discs with a faint edge between them: too weak to split the mask, but a line from corner to corner."""
    edges = around(DISCS[0] | DISCS[1])
    edges[25:56, 58:60] = np.maximum(edges[25:56, 58:60], 0.2)
    pair = DISCS[0] | DISCS[1]
    refined = refined_by(edges, pair, 0.8)
    assert refined.sources == [[0]] * 3 and refined.sides.tolist() == [False, True, True]
    for thing in DISCS:
        assert max(iou(thing, mask) for mask in refined.masks) > 0.9
    whole, *sides = refined.masks
    assert iou(whole, pair) > 0.95 and not (sides[0] & sides[1]).any() and (sides[0] | sides[1] == whole).all()
    # The sides share what the whole has lost, each as much as it has of the mask.
    assert refined.scores[0] > 0.5 and (refined.scores[1:] > 0).all()
    areas = [np.count_nonzero(side) for side in sides]
    assert refined.scores[1] / refined.scores[2] == pytest.approx(areas[0] / areas[1])
    assert refined.scores.sum() == pytest.approx(0.8 * iou(whole, pair), rel=0.01)


def test_sides_are_whole() -> None:
    """Pixels near the outline, in cells whose middle is outside, used to go to one of the sides wherever they were."""
    large = np.ones((4, 4))
    things = [np.kron(thing, large) > 0 for thing in DISCS]
    (division,) = divisions([BoxedMask.of(things[0] | things[1])], np.kron(around(*DISCS), large).astype(np.float32))
    assert division is not None
    for side in division.sides:
        _, parts = label(side.inside)
        whole = side.within(np.s_[0 : 4 * HEIGHT, 0 : 4 * WIDTH])
        assert parts == 1 and max(iou(whole, thing) for thing in things) > 0.95


def test_one_thing_has_no_sides() -> None:
    one = disc(40, 60, 25)
    edges = around(one)
    assert len(refined_by(edges, one)) == 1
    folded = edges.copy()
    folded[15:66, 59:61] = np.maximum(edges[15:66, 59:61], 0.2)  # as strong as what divides the discs
    assert len(refined_by(folded, one)) == 1


def test_a_stronger_edge_makes_two_likelier() -> None:
    pair, edges = DISCS[0] | DISCS[1], around(DISCS[0] | DISCS[1])
    chances = []
    for strength in (0.05, 0.2, 0.4):
        edges[25:56, 58:60] = np.maximum(edges[25:56, 58:60], strength)
        (division,) = divisions([BoxedMask.of(pair)], edges)
        chances.append(0 if division is None else division.chance)
    assert 0 < chances[0] < chances[1] < chances[2] < 1  # their shape alone makes a line


def test_lines_do_not_depend_on_the_other_masks() -> None:
    rng = np.random.default_rng(5)
    edges = np.clip(around(*DISCS) + rng.uniform(0, 0.3, (HEIGHT, WIDTH)), 0, 1).astype(np.float32)
    discs = [disc(*place) for place in rng.integers((0, 0, 4), (HEIGHT, WIDTH, 30), (8, 3)).tolist()]
    masks = [BoxedMask.of(mask) for mask in (*discs, DISCS[0] | DISCS[1], disc(3, 3, 2), np.eye(HEIGHT, WIDTH) > 0)]
    together = divisions(masks, edges)
    for mask, found in zip(masks, together, strict=True):
        (alone,) = divisions([mask], edges)
        assert (alone is None) == (found is None)
        if alone is not None and found is not None:
            assert alone.chance == found.chance
            assert [side.rle(edges.shape) for side in alone.sides] == [side.rle(edges.shape) for side in found.sides]
    assert any(together)
