"""A picture at the size and shape that a network takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Resampling

FIXED_POINT = 22  # bits behind the point of Pillow's weights for 8-bit pictures, which others scale by, too


def padded_length(length: int, multiple_of: int, min_size: int) -> int:
    """The next length that a network takes, pixels; `min_size` is a multiple of `multiple_of`."""
    return max(-(-length // multiple_of) * multiple_of, min_size)


def scaled_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the longest side `size` pixels, each at least 1."""
    longest = max(height, width)
    return max(1, round(height * size / longest)), max(1, round(width * size / longest))


def fit(rgb: NDArray[np.uint8], size: int, padded: Callable[[int], int]) -> tuple[NDArray[np.uint8], int, int]:
    """Scale the longest side to `size` pixels, then lengthen each side to what `padded` makes of it.

    Args:
        rgb: uint8 [H, W, 3].
        padded: length of a side → that length or more. The border is repeated, so that it makes no edge.

    Returns:
        uint8 [h + bottom, w + right, 3], and h and w without the padding.
    """
    height, width = scaled_shape(rgb.shape[0], rgb.shape[1], size)
    if rgb.shape[:2] != (height, width):
        rgb = np.asarray(scaled(PIL.Image.fromarray(rgb), height, width, Resampling.BICUBIC))
    padding = ((0, padded(height) - height), (0, padded(width) - width), (0, 0))
    return np.pad(rgb, padding, mode="edge"), height, width


def unfit(answer: NDArray[np.float32], height: int, width: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The answer to what `fit` made, float32 [h + bottom, w + right]: without padding, at the picture's own `shape`."""
    answer = np.ascontiguousarray(answer[:height, :width])
    if answer.shape == shape[:2]:
        return answer
    full_size = np.asarray(scaled(PIL.Image.fromarray(answer), shape[0], shape[1], Resampling.BILINEAR))
    clipped: NDArray[np.float32] = np.clip(full_size, 0.0, 1.0)
    return clipped


def scaled(picture: PIL.Image.Image, height: int, width: int, how: Resampling) -> PIL.Image.Image:
    """The width first, then the height: in one call the order, and with it the pixels, depends on Pillow's version."""
    for sides in ((width, picture.height), (width, height)):
        if picture.size != sides:  # Pillow copies a picture that has its size already
            picture = picture.resize(sides, how)
    return picture
