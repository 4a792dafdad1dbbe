"""ODS, OIS, AP, clDice and the matching below them, against hand-made cases and scipy's assignment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

pytest.importorskip("scipy", reason="needs trace-sdk[evaluate]")
pytest.importorskip("skimage", reason="needs trace-sdk[evaluate]")

from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from trace_sdk.errors import ArgumentError
from trace_sdk.evaluation.edges import (
    EdgeCounts,
    EdgeScores,
    average_precision,
    best_f,
    count_edges,
    score_edges,
    threshold_values,
)
from trace_sdk.evaluation.matching import BoundaryMatcher

SIDE = 100
WITHIN_2_PX = 0.02  # of the diagonal of 100 x 100: 2.83 px

Mask = NDArray[np.bool_]


def line(column: int) -> Mask:
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[10:90, column] = True
    return mask


def soft(mask: Mask, value: float = 1.0) -> NDArray[np.float32]:
    return mask.astype(np.float32) * np.float32(value)


def score(edges: NDArray[np.float32], *truths: Mask, max_dist: float = WITHIN_2_PX) -> EdgeScores:
    return score_edges([count_edges(edges, truths, thresholds=9, max_dist=max_dist)], max_dist)


def curve(*points: tuple[int, int, int, int]) -> EdgeCounts:
    predicted, matched, truth, found = np.array(points).T
    return EdgeCounts(predicted, matched, matched, truth, found, found, *[np.zeros_like(truth)] * 4)


def test_perfect_prediction() -> None:
    scores = score(soft(line(50)), line(50))
    assert (scores.ods, scores.ois, scores.ap, scores.cldice) == pytest.approx((1, 1, 1, 1))


def test_empty_prediction() -> None:
    scores = score(soft(line(50), 0), line(50))
    assert (scores.ods, scores.ois, scores.ap, scores.cldice) == (0, 0, 0, 0)


def test_nothing_to_find() -> None:
    assert score(soft(line(50)), np.zeros((SIDE, SIDE), np.bool_)).ods == 0


@pytest.mark.parametrize(("shift", "ods"), [(0, 1), (1, 1), (2, 1), (3, 0), (4, 0)])
def test_shift_within_and_beyond_the_tolerance(shift: int, ods: float) -> None:
    assert score(soft(line(50 + shift)), line(50)).ods == pytest.approx(ods)


def test_two_lines_near_one_are_half_right() -> None:
    scores = score(soft(line(49) | line(51)), line(50))
    assert (scores.precision, scores.recall) == pytest.approx((0.5, 1))
    assert scores.cldice == pytest.approx(1)  # without one-to-one both lie near the truth


def test_any_annotator_makes_a_pixel_right_and_each_counts_for_recall() -> None:
    counts = count_edges(soft(line(50)), [line(50), line(51), line(80)], thresholds=1, max_dist=WITHIN_2_PX)
    assert [int(values[0]) for values in vars(counts).values()] == [80, 80, 80, 240, 160, 160, 0, 0, 0, 0]


def test_cldice_of_a_half_found_boundary() -> None:
    half = line(50)
    half[50:] = False
    scores = score(soft(half | line(20)), line(50), max_dist=0.001)
    assert scores.cldice == pytest.approx(2 * (40 / 120) * 0.5 / (40 / 120 + 0.5))


def test_each_image_may_choose_its_own_threshold_for_ois() -> None:
    strong = soft(line(50)) + soft(line(20), 0.75)
    weak = soft(line(50), 0.75)
    counts = [count_edges(edges, [line(50)], thresholds=9, max_dist=WITHIN_2_PX) for edges in (strong, weak)]
    scores = score_edges(counts, WITHIN_2_PX)
    assert scores.ois == pytest.approx(1)
    assert 0.8 <= scores.ods < 0.82  # at one threshold a third is wrong (0.8), a little more in between


def test_best_f_lies_between_thresholds() -> None:
    f, threshold, recall, precision = best_f(np.array([0.3, 0.6]), np.array([1.0, 0.2]), np.array([0.2, 1.0]))
    assert f == pytest.approx(0.6, abs=1e-4)
    assert (threshold, recall, precision) == pytest.approx((0.45, 0.6, 0.6), abs=0.01)


def test_average_precision_of_a_hand_made_curve() -> None:
    falls_from_half = (51 + sum(1.5 - r / 100 for r in range(51, 101))) / 101
    assert average_precision(curve((200, 100, 100, 100), (50, 50, 100, 50))) == pytest.approx(falls_from_half)
    assert average_precision(curve((50, 50, 100, 50))) == pytest.approx(51 / 101)  # nothing beyond recall 0.5
    assert average_precision(curve((50, 50, 100, 50), (0, 0, 100, 0))) == pytest.approx(51 / 101)


def test_standard_thresholds() -> None:
    values = threshold_values()
    assert len(values) == 99
    assert values[[0, 49, 98]] == pytest.approx([0.01, 0.5, 0.99])


def assigned(predicted: Mask, truth: Mask, radius: float) -> int:
    """Pairs in the benchmark's min-cost assignment, where an unmatched pixel costs 100 times the radius."""
    distance = cdist(np.argwhere(predicted), np.argwhere(truth))
    cost = np.where(distance <= radius, distance - 200 * max(radius, 1), 0)
    rows, columns = linear_sum_assignment(cost)
    return int(np.count_nonzero(distance[rows, columns] <= radius))


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.bool_, (7, 9)),
    arrays(np.bool_, (7, 9)),
    st.sampled_from([0.0, 1.0, 1.5, math.sqrt(5), 3.3, 20.0]),
)
def test_matching_is_as_large_as_the_min_cost_assignment(predicted: Mask, truth: Mask, radius: float) -> None:
    matching = BoundaryMatcher(truth, radius).match(predicted)
    pairs = assigned(predicted, truth, radius)
    assert np.count_nonzero(matching.predicted_matched) == np.count_nonzero(matching.truth_matched) == pairs
    close = cdist(np.argwhere(predicted), np.argwhere(truth)) <= radius
    assert (matching.predicted_near == close.any(axis=1)).all()
    assert (matching.truth_near == close.any(axis=0)).all()


@pytest.mark.parametrize("seed", range(5))
def test_matching_of_crowded_lines(seed: int) -> None:
    chance = np.random.default_rng(seed)
    predicted, truth = chance.random((2, 40, 40)) < 0.25
    matching = BoundaryMatcher(truth, 2.5).match(predicted)
    assert np.count_nonzero(matching.predicted_matched) == assigned(predicted, truth, 2.5)


@pytest.mark.parametrize(
    ("edges", "truths", "options", "said"),
    [
        (np.full((SIDE, SIDE), np.nan, np.float32), [line(5)], {}, "NaN"),
        (soft(line(5), 2), [line(5)], {}, r"\[0, 1\]"),
        (line(5), [line(5)], {}, "float array"),
        (soft(line(5))[:50], [line(5)], {}, "as large as the image"),
        (soft(line(5)), [], {}, "no boundary map"),
        (soft(line(5)), [line(5).astype(np.uint8)], {}, "bool array"),
        (soft(line(5)), [line(5)], {"thresholds": 0}, "at least 1"),
        (soft(line(5)), [line(5)], {"max_dist": 0.0}, "max_dist"),
    ],
)
def test_wrong_arguments(edges: NDArray[np.float32], truths: list[Mask], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        count_edges(edges, truths, **options)


def test_scores_need_images() -> None:
    with pytest.raises(ArgumentError, match="at least one image"):
        score_edges([])
