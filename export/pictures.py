"""Pictures to measure on: of those the user gave, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Picture = TypeVar("Picture")  # its file or name


def spread(given: Sequence[Picture], most: int) -> list[Picture]:
    """At most so many of what was given, evenly spread."""
    count = min(len(given), most)
    return [given[number * len(given) // count] for number in range(count)]


def blobs(side: int) -> list[NDArray[np.uint8]]:
    """Four pictures uint8 [1, side, side, 3] of coloured blobs, the same each time."""
    rough = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    return [np.array(PIL.Image.fromarray(one).resize((side, side)))[None] for one in rough]
