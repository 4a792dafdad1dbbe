"""Edges one pixel wide: the lines of an `EdgeMap`, and what every map goes through before it is scored."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

MEANS_FROM = 2.0  # σ in pixels from which running means are as good as a Gaussian, and faster
_LEVELS = 2**24  # of a probability in whole numbers, as float32 has them
_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))  # (down, right), from the right


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


def thin_lines(binary: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Lines one pixel wide of a binary map, bool [H, W], in as many pieces as before.

    Guo and Hall, "Parallel thinning with two-subiteration algorithms", Comm. ACM 1989, as the Berkeley benchmark does
    it; only pixels that are set are looked at, of which a map of edges has few.
    """
    height, width = binary.shape
    row = width + 2
    flat = np.pad(binary, 1).ravel()  # a rim, so that every neighbour is a fixed step away
    here, before = np.flatnonzero(flat), -1
    while len(here) != before:
        before = len(here)
        for removable in _removable():
            around = np.zeros(len(here), np.uint8)
            for bit, (down, right) in enumerate(_AROUND):
                around |= flat[here + (down * row + right)].view(np.uint8) << np.uint8(bit)
            gone = removable[around]
            flat[here[gone]] = False
            here = here[~gone]
    return flat.reshape(height + 2, row)[1:-1, 1:-1]


@cache
def _removable() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each of the 256 neighbourhoods whether its centre goes, in the first and in the second sub-iteration."""
    ring = (np.arange(256) >> np.arange(8)[:, None] & 1).astype(np.bool_)  # from the right, against the clock
    east, north_east, north, north_west, west, south_west, south, south_east = ring
    after = np.roll(ring, -1, 0)
    pieces = sum(~ring[i] & (after[i] | ring[(i + 2) % 8]) for i in (0, 2, 4, 6))
    pairs = np.minimum((ring[1::2] | ring[0::2]).sum(0), (ring[1::2] | after[1::2]).sum(0))
    inner = (pieces == 1) & (pairs >= 2) & (pairs <= 3)
    first = inner & ~((north_east | north | ~south_east) & east)
    second = inner & ~((south_west | south | ~north_west) & west)
    return first, second


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
