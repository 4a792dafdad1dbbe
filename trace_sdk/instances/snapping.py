"""Outlines moved to ridges of the edges nearby, and how tight the given outlines are.

Where masks are good, most stronger lines near their outlines are false; where they are loose, most are the true ones.
The masks of a picture tell which they are: what their outlines have above their surroundings, as a share of what they
would have on the nearest ridges.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from trace_sdk.instances.boxed import BoxedMask, widened
from trace_sdk.instances.outlines import line_between

REACH = 0.15  # how far around a mask is near, to the root of its area
TIGHT = 0.45  # share from which outlines are tight, and a change needs all the evidence that `outlines` asks for
HALVED = 0.1  # how much less of that share halves it
LEAST = 0.2  # and what of it stays in any case
BEFORE = (0.1, 0.2)  # what outlines have and could have before any is seen: one mask's worth


def snap(mask: BoxedMask, pieces: NDArray[np.int32]) -> BoxedMask:
    """The pieces of a picture that lie in a mask by more than half, of each what is near the mask.

    Args:
        pieces: int32 [H, W], the finest partition along ridges, see `hierarchy`.
    """
    box = widened(mask.box, _reach(mask), pieces.shape)
    labels = pieces[box] - pieces[box].min()
    areas = np.bincount(labels.ravel())
    held = np.bincount(labels[mask.within(box)], minlength=len(areas))
    return BoxedMask.of((2 * held > areas).take(labels), (box[0].start, box[1].start))


def above_surroundings(mask: BoxedMask, snapped: BoxedMask, odds: NDArray[np.float32]) -> tuple[float, float]:
    """What the outline of a mask, and that of its snapped form, have above a strip around the mask's: mean log-odds.

    Args:
        odds: float32 [H, W], log-odds of the edge probability.
    """
    reach = _reach(mask)
    box = widened(mask.box, reach, odds.shape)
    near, own = odds[box], mask.within(box)
    # A strip is wide and its mean needs few of its pixels.
    step = max(1, reach // 3)
    share = uniform_filter(own[::step, ::step].astype(np.float32), 2 * (reach // step) + 1)
    strip = near[::step, ::step][(share > _NONE) & (share < 1 - _NONE)]
    lines = [near[line_between(inside, ~inside)] for inside in (own, snapped.within(box))]
    if not len(strip) or not all(len(line) for line in lines):
        return 0.0, 0.0
    level = float(strip.mean())
    return float(lines[0].mean()) - level, float(lines[1].mean()) - level


def evidence_needed(outlines: Sequence[tuple[float, float]]) -> float:
    """What of the usual evidence a change needs, in [LEAST, 1]: less where the outlines of a picture are loose.

    Args:
        outlines: of each mask what `above_surroundings` answers.
    """
    has, could = (fsum(values) for values in zip(BEFORE, *outlines, strict=True))  # the same in any order
    share = has / max(could, _NONE)
    return float(max(LEAST, 2 ** ((min(share, TIGHT) - TIGHT) / HALVED)))


def _reach(mask: BoxedMask) -> int:
    return max(2, int(REACH * mask.area**0.5))


_NONE = 1e-3
