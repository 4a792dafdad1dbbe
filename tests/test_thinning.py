"""Lines one pixel wide, against another implementation of the same paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from trace_sdk.thinning import thin_lines

morphology = pytest.importorskip("skimage.morphology", reason="needs trace-sdk[evaluate]")


@settings(max_examples=200, deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_lines_are_those_of_skimage(binary: NDArray[np.bool_]) -> None:
    before = binary.copy()
    assert np.array_equal(thin_lines(binary), morphology.thin(binary))
    assert np.array_equal(binary, before)


def test_thick_shapes_are_thinned_to_their_middle() -> None:
    disc = np.hypot(*(np.indices((61, 83)) - np.array([30, 40])[:, None, None])) < 25
    for binary in (disc, disc & ~np.roll(disc, 3, 0), np.pad(np.ones((9, 40), np.bool_), 5)):
        lines = thin_lines(binary)
        assert np.array_equal(lines, morphology.thin(binary)) and 0 < lines.sum() < 80
