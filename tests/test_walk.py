from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trace_sdk.instances.affinity import BETA, RADIUS, transition_matrix
from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.walk import TAIL, Fragment, Regions, spread, spread_fragments


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


def test_a_region_that_lies_in_the_mask_stays_in_every_proposal() -> None:
    """The walk from everywhere goes nowhere, which once read as nothing reached."""
    fragments = [Fragment(0, 0, 0, 1.0), Fragment(0, 1, 0, 0.5)]
    columns = np.indices((80, 120))[1]
    regions, mask = Regions((columns >= 60).astype(np.int32)), BoxedMask.of(columns < 90)
    (_, whole), (_, half) = spread_fragments(np.zeros((80, 120), np.float32), regions, [mask], fragments, 0.25)
    assert (whole == 1).all() and 0 <= half.min() < half.max() <= 1
