from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_sdk.errors import ArgumentError
from trace_sdk.tiling import blend, tiles

Lengths = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(Lengths, Lengths, st.integers(1, 12), st.integers(0, 11), st.sampled_from([1, 8]), st.integers(0, 99))
def test_windows_cover_everything_and_blend_back(
    rows: int, columns: int, tile: int, overlap: int, step: int, seed: int
) -> None:
    overlap = min(overlap, tile - 1)
    height, width = rows * step, columns * step
    windows = tiles(height, width, tile * step, overlap * step, step)
    values = np.random.default_rng(seed).random((height, width), np.float32)
    assert {(w.height, w.width) for w in windows} == {(min(tile, rows) * step, min(tile, columns) * step)}
    assert all(w.top % step == 0 and w.left % step == 0 for w in windows)
    back = blend(((w, values[w.slices]) for w in windows), height, width, overlap * step)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(2, 60), st.integers(1, 59))
def test_neighbours_share_at_least_the_overlap(length: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile - 1)
    tops = [w.top for w in tiles(length, 1, tile, overlap)]
    assert tops[0] == 0 and tops[-1] + min(tile, length) == length
    assert all(0 < after - before <= tile - overlap for before, after in pairwise(tops))


def test_two_disagreeing_windows_leave_no_step() -> None:
    windows = tiles(64, 150, 100, 50)
    pieces = [(w, np.full((w.height, w.width), i, np.float32)) for i, w in enumerate(windows)]
    row = blend(pieces, 64, 150, 50)[30]
    assert row[0] == 0 and row[-1] == 1
    assert np.abs(np.diff(row)).max() < 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 4, 4), "below tile=4"),
        ((10, 10, 4, -1), "at least 0"),
        ((10, 16, 8, 0, 8), "height=10 must be a positive multiple of 8"),
        ((16, 16, 12, 0, 8), "tile=12"),
        ((0, 10, 4, 1), "height=0"),
    ],
)
def test_wrong_arguments(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tiles(*arguments)
