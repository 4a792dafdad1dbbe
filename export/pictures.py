"""Pictures to measure on where the user gave none."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray


def blobs(side: int) -> list[NDArray[np.uint8]]:
    """Four pictures uint8 [1, side, side, 3] of coloured blobs, the same each time."""
    rough = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    return [np.array(PIL.Image.fromarray(one).resize((side, side)))[None] for one in rough]
