from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label
from skimage.morphology import local_minima

from trace_sdk.instances.hierarchy import find_minima
from trace_sdk.instances.watershed import watershed


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("seed", range(8))
def test_no_pixel_goes_over_a_higher_pass_than_it_must(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    heights = rng.integers(levels, size=(11, 14)).astype(np.float32)
    markers, count = label(rng.random(heights.shape) < rng.choice([0.02, 0.1, 0.3]))
    markers[5, 7] = markers[5, 7] or count + 1  # one at least
    markers, count = label(markers > 0)
    found = watershed(heights, markers)
    assert found.dtype == np.int32 and (found[markers > 0] == markers[markers > 0]).all()
    assert set(np.unique(found)) == set(range(1, count + 1))
    assert all(label(found == marker)[1] == 1 for marker in range(1, count + 1))
    for level in np.unique(heights):
        lakes, number = label(heights <= level)
        for lake in range(1, number + 1):
            inside = lakes == lake
            reached = set(markers[inside]) - {0}
            assert not reached or set(found[inside & (markers == 0)]) <= reached


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_thin_and_flat_maps(shape: tuple[int, int]) -> None:
    markers = np.zeros(shape, np.int32)
    markers.flat[0] = 1
    assert (watershed(np.zeros(shape, np.float32), markers) == 1).all()


def test_a_ridge_divides() -> None:
    heights = np.zeros((6, 9), np.float32)
    heights[:, 4] = 1
    markers = np.zeros(heights.shape, np.int32)
    markers[1, 1], markers[4, 8] = 1, 2
    found = watershed(heights, markers)
    assert (found[:, :4] == 1).all() and (found[:, 5:] == 2).all()


@pytest.mark.parametrize("levels", [2, 4, 50])
def test_minima_are_scikit_images(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for shape in [(12, 17), (30, 3), (2, 2)] * 5:
        values = rng.integers(levels, size=shape).astype(np.uint8)
        values[0, 0] = levels  # scikit-image finds no minimum in a constant picture
        assert (find_minima(values) == local_minima(values).astype(np.bool_)).all()
