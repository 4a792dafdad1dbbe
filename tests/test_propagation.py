from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as codec

from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError
from trace_sdk.instances.outlines import border_evidence, line_between, outline_strength

HEIGHT, WIDTH = 80, 120


def map_of(*lines: tuple[Any, Any], strength: float = 1.0) -> EdgeMap:
    """80 × 120 with edges on the given (rows, columns)."""
    edges = np.zeros((HEIGHT, WIDTH), np.float32)
    for line in lines:
        edges[line] = strength
    return EdgeMap(edges, np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5)


def box(top: int, bottom: int, left: int, right: int) -> Any:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def iou(a: Any, b: Any) -> float:
    return float(np.count_nonzero(a & b) / np.count_nonzero(a | b))


# Two things side by side: rows 20 to 60, columns 20 to 60 and 60 to 100, an edge all around and between.
PAIR = map_of(
    *((slice(20, 61), column) for column in (20, 60, 100)), *((row, slice(20, 101)) for row in (20, 60))
)  # fmt: skip
LEFT, RIGHT = box(20, 61, 20, 60), box(20, 61, 60, 101)


def test_outline_strength() -> None:
    assert outline_strength(LEFT, PAIR.probability) > 0.98
    assert outline_strength(box(30, 50, 30, 50), PAIR.probability) == 0
    assert outline_strength(np.ones((HEIGHT, WIDTH), np.bool_), PAIR.probability) == 0  # the rim is no outline
    edges = np.zeros((HEIGHT, WIDTH), np.float32)
    edges[:, 60] = 0.6
    half = outline_strength(box(0, HEIGHT, 0, 60), edges)
    assert half == pytest.approx(0.6)


def test_a_border_holds_all_along() -> None:
    """A line that is strong over half of its length is no border, whatever its mean."""
    whole, line = LEFT | RIGHT, line_between(LEFT, RIGHT)
    assert border_evidence(whole, line, PAIR.probability) > 3
    gap = PAIR.probability.copy()
    gap[22:42, 60] = 0
    assert border_evidence(whole, line, gap) < -0.7
    assert np.count_nonzero(~EdgeMap(gap, PAIR.rgb, 0.3).refine(whole[None]).sides) == 1
    assert np.count_nonzero(~EdgeMap(gap, PAIR.rgb, 0.3).refine(np.stack([LEFT, RIGHT])).sides) == 1


def test_merged_neighbours_are_split() -> None:
    refined = PAIR.refine((LEFT | RIGHT)[None])
    assert len(refined) == 2 and refined.sources == [[0], [0]]
    assert max(iou(mask, LEFT) for mask in refined.masks) > 0.9
    assert max(iou(mask, RIGHT) for mask in refined.masks) > 0.9


def test_without_an_edge_between_them_they_are_one() -> None:
    outer = map_of(*((slice(20, 61), column) for column in (20, 100)), *((row, slice(20, 101)) for row in (20, 60)))
    refined = outer.refine((LEFT | RIGHT)[None])
    assert len(refined) == 1 and iou(refined.masks[0], LEFT | RIGHT) > 0.93


@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        (LEFT & ~box(35, 45, 32, 42), "a hole"),
        (box(14, 66, 14, 60), "a loose border outside"),
        (box(26, 55, 26, 55), "too small"),
        (LEFT & ~box(20, 61, 36, 42), "a gap across"),
        (LEFT | box(30, 50, 60, 85), "a spur over the edge"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_repaired(damaged: Any, what: str) -> None:
    refined = PAIR.refine(damaged[None])
    assert len(refined) == 1, what
    assert iou(refined.masks[0], LEFT) > max(0.9, iou(damaged, LEFT)), what  # a pixel all around


def test_halves_of_one_thing_become_one() -> None:
    refined = PAIR.refine(np.stack([LEFT & box(0, 80, 0, 41), LEFT & box(0, 80, 39, 120)]), [0.5, 0.9])
    assert len(refined) == 1 and refined.sources == [[0, 1]]
    assert iou(refined.masks[0], LEFT) > 0.93
    assert 0.4 < refined.scores[0] < 0.6  # .9 times an IoU of about a half


def test_a_good_mask_stays_and_keeps_its_score() -> None:
    refined = PAIR.refine(LEFT[None], [0.8])
    assert iou(refined.masks[0], LEFT) > 0.93 and refined.scores[0] > 0.74


def test_without_any_edge_a_mask_stays_as_it_is() -> None:
    mask = box(10, 40, 15, 70)
    refined = map_of().refine(mask[None], [0.7])
    assert (refined.masks[0] == mask).all() and refined.scores.tolist() == [0.7]


def test_copies_are_merged_and_the_best_score_stays() -> None:
    refined = PAIR.refine(np.stack([LEFT, LEFT, RIGHT]), [0.2, 0.6, 0.4])
    assert len(refined) == 2 and refined.sources[0] == [0, 1]
    assert refined.scores[0] == pytest.approx(0.6, rel=0.08)


def blobs(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(8):
        top, left = rng.integers(0, 60), rng.integers(0, 90)
        found.append(box(top, top + rng.integers(8, 40), left, left + rng.integers(8, 60)))
    return np.stack(found)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_masks_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = EdgeMap(np.clip(PAIR.probability * 0.8 + rng.uniform(0, 0.3, (HEIGHT, WIDTH)), 0, 1).astype(np.float32),
                    PAIR.rgb, 0.5)  # fmt: skip
    masks, scores = blobs(seed), rng.uniform(0, 1, 8)
    order = rng.permutation(8)
    one, other = noisy.refine(masks, scores.tolist()), noisy.refine(masks[order], scores[order].tolist())
    assert one.rle == other.rle and one.scores.tolist() == other.scores.tolist()
    assert one.sources == [sorted(int(order[i]) for i in indices) for indices in other.sources]


def lone(row: int, column: int) -> Any:
    coarse = np.zeros((10, 15), np.float32)
    coarse[row, column] = 1
    return coarse


@settings(max_examples=8, deadline=None)
@example(718, lone(6, 9))  # neighbours that became one have IoU > 0.5 with a third mask
@given(st.integers(0, 10_000), arrays(np.float32, (10, 15), elements=st.floats(0, 1, width=32)))
def test_no_two_results_are_the_same_thing(seed: int, coarse: Any) -> None:
    edges = EdgeMap(np.repeat(np.repeat(coarse, 8, 0), 8, 1), PAIR.rgb, 0.5)
    refined = edges.refine(blobs(seed))
    wholes = [rle for rle, side in zip(refined.rle, refined.sides, strict=True) if not side]
    overlap = codec.iou(wholes, wholes, [0] * len(wholes))
    assert (overlap - np.eye(len(wholes)) <= 0.5).all()
    assert {index for indices in refined.sources for index in indices} <= set(range(8))
    assert all(mask.any() for mask in refined.masks) and ((refined.scores > 0) & (refined.scores <= 1)).all()


def test_a_mask_stays_where_edges_inside_it_are_no_stronger_than_its_outline() -> None:
    """Weak edges inside a thing neither split it nor move its outline: refinement used to follow them."""
    rng = np.random.default_rng(3)
    edges = np.clip(PAIR.probability * 0.6, 0, 1)
    edges[20:61, 35] = edges[40, 20:60] = 0.55  # folds inside the left thing, over the threshold
    noisy = EdgeMap(np.clip(edges + rng.uniform(0, 0.1, edges.shape), 0, 1).astype(np.float32), PAIR.rgb, 0.4)
    refined = noisy.refine(LEFT[None], [0.8])
    assert len(refined) == 1 and iou(refined.masks[0], LEFT) > 0.97


def test_a_hole_with_an_edge_around_stays() -> None:
    ring = PAIR.probability.copy()
    ring[30:45, 30], ring[30:45, 44], ring[30, 30:45], ring[44, 30:45] = 1, 1, 1, 1
    mask = LEFT & ~box(30, 45, 30, 45)
    kept = EdgeMap(ring, PAIR.rgb, 0.5).refine(mask[None])
    assert not kept.masks[0][34:41, 34:41].any()
    assert PAIR.refine(mask[None]).masks[0][34:41, 34:41].all()


@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_touching_masks_are_joined_unless_an_edge_keeps_them_apart(strength: float) -> None:
    """Two thirds of one thing each, but little of each in common, so that only the line between them can tell."""
    edges = map_of(*((slice(20, 61), column) for column in (20, 100)), *((row, slice(20, 101)) for row in (20, 60)))
    crossed = edges.probability.copy()
    crossed[20:61, 60] = np.maximum(crossed[20:61, 60], strength)
    refined = EdgeMap(crossed, PAIR.rgb, 0.5).refine(np.stack([LEFT, RIGHT]))
    assert len(refined) == (2 if strength else 1)


def test_a_small_thing_on_a_large_one_is_not_joined() -> None:
    inner = box(30, 40, 30, 40)
    assert len(PAIR.refine(np.stack([LEFT & ~inner, inner]))) == 2


def shelf(halved: int) -> tuple[EdgeMap, list[Any]]:
    """Six things in a row with clear outlines, full of edges but for their middle; the first `halved` in two masks."""
    edges = np.full((HEIGHT, WIDTH), 0.05, np.float32)
    masks = []
    for number, left in enumerate(range(2, 114, 19)):
        edges[20:61, left : left + 19] = 0.7
        edges[21:60, left + 1 : left + 18] = 0.3
        edges[37:43, left + 1 : left + 18] = 0.21
        thing = box(21, 60, left + 1, left + 18)
        upper = thing & box(0, 40, 0, WIDTH)
        masks += [upper, thing & ~upper] if number < halved else [thing]
    return EdgeMap(edges, PAIR.rgb, 0.6), masks


@pytest.mark.parametrize(("halved", "left"), [(0, 6), (1, 7), (6, 6)])
def test_lines_of_a_picture_are_judged_together(halved: int, left: int) -> None:
    """One line that is no clear border joins nothing; six of them say that these masks come in halves."""
    edges, masks = shelf(halved)
    refined = edges.refine(np.stack(masks))
    assert len(refined) == left
    if halved == 1:
        # The halves may be one thing, and the others can't.
        assert {tuple(source) for source in refined.sources[-2:]} == {(0,), (1,)}


def test_a_score_tells_that_a_mask_may_be_a_half() -> None:
    edges, masks = shelf(1)
    refined = edges.refine(np.stack(masks), [0.8] * len(masks))
    score_of = {source: score for (source,), score in zip(refined.sources, refined.scores, strict=True)}
    alone = edges.refine(masks[0][None], [0.8]).scores[0]
    assert score_of[0] < 0.9 * alone and score_of[4] > 0.7


def test_no_masks() -> None:
    refined = PAIR.refine(np.zeros((0, HEIGHT, WIDTH), np.bool_))
    assert len(refined) == 0 and refined.masks.shape == (0, HEIGHT, WIDTH) and refined.scores.shape == (0,)


@pytest.mark.parametrize(
    ("masks", "scores", "message"),
    [
        (LEFT, None, r"masks are bool \[80, 120\]; expected bool or integers \[K, 80, 120\]"),
        (LEFT[None, :, :-1], None, r"masks are bool \[1, 80, 119\]"),
        (LEFT[None].astype(np.float32), None, r"masks are float32"),
        (np.stack([LEFT, LEFT & RIGHT]), None, "Mask 1 is empty"),
        (LEFT[None], [1.0, 2.0], "expected 1 finite numbers"),
        (LEFT[None], [float("nan")], "expected 1 finite numbers"),
        (LEFT[None], [-1.0], "expected 1 finite numbers of 0 or more"),
    ],
)
def test_bad_masks(masks: Any, scores: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PAIR.refine(masks, scores)
