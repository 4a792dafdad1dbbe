from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as codec
from scipy.ndimage import label

from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError
from trace_sdk.instances.affinity import BETA, RADIUS, transition_matrix
from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.dividing import divisions
from trace_sdk.instances.outlines import QUIET, border_evidence, line_between, log_odds, outline_strength
from trace_sdk.instances.snapping import LEAST, above_surroundings, evidence_needed, snap
from trace_sdk.instances.splitting import cut_at_gaps
from trace_sdk.instances.walk import TAIL, Fragment, Regions, spread, spread_fragments

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


def dense_transition(edges: Any, regions: Any) -> Any:
    """T straight from its definition, in float64, cell by cell."""
    width = edges.shape[1]
    a = np.eye(edges.size)
    for i in range(edges.size):
        for j in range(edges.size):
            (y, x), (v, u) = divmod(i, width), divmod(j, width)
            if i != j and np.hypot(v - y, u - x) <= RADIUS and regions[y, x] == regions[v, u]:
                n = max(abs(v - y), abs(u - x))
                # From the upper end, so that a path and its way back are one.
                (y0, x0), (y1, x1) = sorted([(y, x), (v, u)], key=lambda p: (p[0], p[1]))
                path = [edges[y0 + round((y1 - y0) * k / n), x0 + round((x1 - x0) * k / n)] for k in range(n + 1)]
                a[i, j] = (1 - max(path)) ** BETA
    return a / a.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(9, 13), (3, 20), (1, 7)])
def test_the_walk_is_256_applications_of_t(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    edges = rng.uniform(0, 0.6, shape).astype(np.float32) ** 2
    regions = (np.indices(shape)[1] > shape[1] // 2).astype(np.int32)
    seeds = rng.integers(0, 2, (3, *shape)).astype(np.float32)
    dense = dense_transition(edges, regions)
    assert np.abs(transition_matrix(edges, regions).toarray() - dense).max() < 1e-6
    for seed in seeds.reshape(3, -1):
        exact = np.linalg.matrix_power(dense, 256) @ seed
        assert np.abs(spread(transition_matrix(edges, regions), seed, 256) - exact).max() <= 2 * TAIL
        assert np.abs(exact - seed).max() > 0.2  # the walk does something


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_steps_are_exact(steps: int) -> None:
    rng = np.random.default_rng(1)
    edges, regions = rng.uniform(0, 0.3, (6, 8)).astype(np.float32), np.zeros((6, 8), np.int32)
    seeds = rng.uniform(0, 1, 48).astype(np.float32)
    exact = np.linalg.matrix_power(dense_transition(edges, regions), steps) @ seeds
    assert np.abs(spread(transition_matrix(edges, regions), seeds, steps) - exact).max() < 1e-5


def test_no_walk_through_a_wall_or_out_of_a_region() -> None:
    edges = np.zeros((20, 20), np.float32)
    edges[:, 10] = 1
    seeds = np.zeros((20, 20), np.float32)
    seeds[:, :10] = 1
    one = np.zeros((20, 20), np.int32)
    through = spread(transition_matrix(edges, one), seeds.ravel(), 256).reshape(20, 20)
    assert np.allclose(through[:, :10], 1, atol=TAIL) and np.allclose(through[:, 10:], 0, atol=TAIL)
    halves = (np.arange(20) >= 10).astype(np.int32) * np.ones((20, 1), np.int32)
    stayed = spread(transition_matrix(np.zeros_like(edges), halves), seeds.ravel(), 256)
    assert np.allclose(stayed, seeds.ravel(), atol=TAIL)


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


def test_a_region_that_lies_in_the_mask_stays_in_every_proposal() -> None:
    """The walk from everywhere goes nowhere, which once read as nothing reached."""
    fragments = [Fragment(0, 0, 0, 1.0), Fragment(0, 1, 0, 0.5)]
    labels = (np.indices((HEIGHT, WIDTH))[1] >= 60).astype(np.int32)
    regions, mask = Regions(labels), BoxedMask.of(box(0, HEIGHT, 0, 90))
    (_, whole), (_, half) = spread_fragments(PAIR.probability * 0, regions, [mask], fragments, 0.25)
    assert (whole == 1).all() and 0 <= half.min() < half.max() <= 1


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


@pytest.mark.parametrize(("gap", "strength", "count"), [(2, 0.8, 2), (2, 0.0, 1), (16, 0.8, 1)])
def test_a_mask_is_cut_at_a_narrow_gap_with_an_edge_in_it(gap: int, strength: float, count: int) -> None:
    """One thing behind a pole stays one, and so does one with a crack."""
    outer = map_of(*((slice(20, 61), column) for column in (20, 100)), *((row, slice(20, 101)) for row in (20, 60)))
    edges = outer.probability.copy()
    edges[21:60, 60 - gap // 2] = strength
    parts = cut_at_gaps(BoxedMask.of((LEFT | RIGHT) & ~box(20, 61, 60 - gap // 2, 60 + gap // 2)), edges)
    assert len(parts) == count
    if count == 2:
        assert {part.box[1].start for part in parts} == {20, 61}


def test_small_parts_go_with_the_nearest() -> None:
    mask = (LEFT | RIGHT) & ~box(20, 61, 59, 61)
    mask[61:64, 99:101] = mask[62:64, 22:24] = True  # one touches, one doesn't
    parts = cut_at_gaps(BoxedMask.of(mask), PAIR.probability)
    assert sorted(part.area for part in parts) == [41 * 39 + 4, 41 * 40 + 6]


def test_snap_takes_pieces_that_lie_in_the_mask_by_more_than_half() -> None:
    pieces = (np.indices((40, 40))[1] // 10 + 4 * (np.indices((40, 40))[0] // 20)).astype(np.int32)  # 20 × 10 each
    mask = np.zeros((40, 40), np.bool_)
    mask[0:20, 0:23] = True  # half of what is near of the third column
    mask[20, 0:10] = True  # and a quarter of that below
    expected = np.zeros((40, 40), np.bool_)
    expected[0:20, 0:20] = True
    assert (snap(BoxedMask.of(mask), pieces).within((slice(0, 40), slice(0, 40))) == expected).all()


def test_loose_masks_need_less_evidence_than_tight_ones() -> None:
    odds = log_odds(np.maximum(PAIR.probability, QUIET)).astype(np.float32)
    tight, loose = BoxedMask.of(LEFT), BoxedMask.of(box(23, 58, 23, 57))
    for mask, needed in ((tight, 1.0), (loose, LEAST)):
        found = above_surroundings(mask, tight, odds)
        assert found[1] > 1
        assert evidence_needed([found] * 5) == pytest.approx(needed)
    # A crowd of tight ones keeps a loose one among them from moving freely.
    one = [above_surroundings(loose, tight, odds)]
    assert evidence_needed([above_surroundings(tight, tight, odds)] * 9 + one) == pytest.approx(1)
    assert evidence_needed([]) == pytest.approx(1)
    # On ridges nearby an outline may have as good as nothing, or less.
    assert evidence_needed([(9.0, -0.2)]) == 1 and evidence_needed([(-9.0, -0.2)]) == LEAST


def test_a_score_tells_that_a_mask_may_be_a_half() -> None:
    edges, masks = shelf(1)
    refined = edges.refine(np.stack(masks), [0.8] * len(masks))
    score_of = {source: score for (source,), score in zip(refined.sources, refined.scores, strict=True)}
    alone = edges.refine(masks[0][None], [0.8]).scores[0]
    assert score_of[0] < 0.9 * alone and score_of[4] > 0.7


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


def test_touching_things_in_one_mask_are_given_beside_it() -> None:
    """Two discs with a faint edge between them: too weak to split the mask, but a line from corner to corner."""
    edges = around(DISCS[0] | DISCS[1])
    edges[25:56, 58:60] = np.maximum(edges[25:56, 58:60], 0.2)
    pair = (DISCS[0] | DISCS[1])[None]
    refined = EdgeMap(edges, PAIR.rgb, 0.5).refine(pair, [0.8])
    assert refined.sources == [[0]] * 3 and refined.sides.tolist() == [False, True, True]
    for thing in DISCS:
        assert max(iou(thing, mask) for mask in refined.masks) > 0.9
    whole, *sides = refined.masks
    assert iou(whole, pair[0]) > 0.95 and not (sides[0] & sides[1]).any() and (sides[0] | sides[1] == whole).all()
    # The sides share what the whole has lost, each as much as it has of the mask.
    assert refined.scores[0] > 0.5 and (refined.scores[1:] > 0).all()
    areas = [np.count_nonzero(side) for side in sides]
    assert refined.scores[1] / refined.scores[2] == pytest.approx(areas[0] / areas[1])
    assert refined.scores.sum() == pytest.approx(0.8 * iou(whole, pair[0]), rel=0.01)


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
    assert len(EdgeMap(edges, PAIR.rgb, 0.5).refine(one[None])) == 1
    folded = edges.copy()
    folded[15:66, 59:61] = np.maximum(edges[15:66, 59:61], 0.2)  # as strong as what divides the discs
    assert len(EdgeMap(folded, PAIR.rgb, 0.5).refine(one[None])) == 1


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
    masks = [BoxedMask.of(mask) for mask in (*blobs(1), DISCS[0] | DISCS[1], disc(3, 3, 2), np.eye(HEIGHT, WIDTH) > 0)]
    together = divisions(masks, edges)
    for mask, found in zip(masks, together, strict=True):
        (alone,) = divisions([mask], edges)
        assert (alone is None) == (found is None)
        if alone is not None and found is not None:
            assert alone.chance == found.chance
            assert [side.rle(edges.shape) for side in alone.sides] == [side.rle(edges.shape) for side in found.sides]
    assert any(together)


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
    ],
)
def test_bad_masks(masks: Any, scores: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PAIR.refine(masks, scores)
