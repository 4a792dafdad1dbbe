"""Edges one pixel wide: the lines of an `EdgeMap`, and what every map goes through before it is scored."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MEANS_FROM = 2.0  # σ in pixels from which running means are as good as a Gaussian, and faster
_LEVELS = 2**24  # of a probability in whole numbers, as float32 has them


def thin_ridges(probability: NDArray[np.float32], magnification: float = 1.0) -> NDArray[np.float32]:
    """Non-maximum suppression: float32 [H, W], the probability on ridges and 0 elsewhere.

    Args:
        probability: float [H, W] in [0, 1].
        magnification: how much the network's answer was enlarged, at least 1.
    """
    probability = probability.astype(np.float32, copy=False)
    smooth = _blur(probability, 1.5 * magnification)
    # The smoothed map breaks ties only, unless enlarging left facets that are no ridges.
    height = _blur(probability, 0.5 * magnification) if magnification > 1 else probability
    height = height + np.float32(1e-3) * smooth

    # Few pixels are higher than those beside them, and the rest is done for these only.
    here = np.flatnonzero(_crests(height))
    around, centre = _neighbours(smooth, here), smooth.ravel()[here]
    d_yy = around[-1, 0] - 2 * centre + around[1, 0]
    d_xx = around[0, -1] - 2 * centre + around[0, 1]
    d_xy = (around[-1, -1] + around[1, 1] - around[-1, 1] - around[1, -1]) / 4
    # The eigenvector of the most negative curvature points across the ridge.
    angle = np.arctan2(-2 * d_xy, d_yy - d_xx) / 2
    normal_y, normal_x = np.sin(angle), np.cos(angle)

    around, centre = _neighbours(height, here), height.ravel()[here]
    steep = np.abs(normal_y) >= np.abs(normal_x)
    slant = np.where(steep, normal_x, normal_y) / np.where(steep, normal_y, normal_x)
    share, rising = np.abs(slant), slant >= 0

    def across(sign: int) -> NDArray[np.float32]:
        # One step along the longer axis of the normal, `share` of a step along the other.
        ahead = np.where(steep, around[sign, 0], around[0, sign])
        aside = np.where(rising, around[sign, sign], np.where(steep, around[sign, -sign], around[-sign, sign]))
        mixed: NDArray[np.float32] = ahead + share * (aside - ahead)
        return mixed

    # Strict on one side only: of two equal neighbours across an edge, exactly one stays.
    after = np.maximum(across(1), np.where(steep, around[1, 0], around[0, 1]))
    highest = (centre > after) & (centre >= across(-1))
    highest &= centre >= np.where(steep, around[-1, 0], around[0, -1])
    ridges = np.zeros_like(probability)
    ridges.ravel()[here[highest]] = probability.ravel()[here[highest]]
    return ridges


def _crests(height: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels above the next and not below the last one of their column, or of their row: all that a ridge can be."""
    crests = np.zeros(height.shape, np.bool_)
    for axis in (0, 1):
        crest, along = np.moveaxis(crests, axis, 0), np.moveaxis(height, axis, 0)
        higher = along[:-1] > along[1:]
        higher[1:] &= along[1:-1] >= along[:-2]
        crest[:-1] |= higher
    return crests


def _neighbours(values: NDArray[np.float32], places: NDArray[np.intp]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """(rows down, columns right) → the neighbours there of some pixels, given by their places; borders replicated."""
    height, width = values.shape
    rows, columns = np.divmod(places, width)
    return {
        (down, right): values[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    }


def _blur(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Gaussian blur with replicated borders, `sigma` in pixels."""
    if sigma > MEANS_FROM:
        return _mean_thrice(values, sigma)
    radius = math.ceil(3 * sigma)
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if axis == i else (0, 0) for i in (0, 1)]
        padded = np.pad(values, pad, mode="edge")
        length = values.shape[axis]
        values = np.zeros_like(values)
        for i, weight in enumerate(weights.astype(np.float32)):
            values += weight * (padded[i : i + length] if axis == 0 else padded[:, i : i + length])
    return values


def _mean_thrice(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """As `_blur`, by three running means a side: the time does not grow with sigma.

    In whole numbers, so that what is flat stays exactly flat.
    """
    # Odd lengths, some of them the next shorter one, so that variances (length² − 1) / 12 add up to sigma².
    long = 2 * math.ceil((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1
    short = round((3 * long**2 - 3 - 12 * sigma**2) / (4 * long - 4))
    lengths = [long - 2] * short + [long] * (3 - short)
    levels = np.rint(values * np.float32(_LEVELS)).astype(np.int64)
    reach = sum(lengths) // 2 - 1
    for axis in (0, 1):
        pad = [(reach + 3, reach) if axis == i else (0, 0) for i in (0, 1)]
        levels = np.pad(levels, pad, mode="edge")
        for length in lengths:
            sums = np.cumsum(levels, axis=axis)
            levels = sums[length:] - sums[:-length] if axis == 0 else sums[:, length:] - sums[:, :-length]
        levels //= math.prod(lengths)
    blurred: NDArray[np.float32] = levels.astype(np.float32) / np.float32(_LEVELS)
    return blurred
