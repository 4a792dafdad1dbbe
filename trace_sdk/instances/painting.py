"""Instances and masks in colour over a photo."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from trace_sdk.edge_map import PEN

FILL = 0.5  # opacity of the colours over the picture


def paint_instances(
    rgb: NDArray[np.uint8], labels: NDArray[np.int32], count: int, *, hatch: bool = False
) -> PIL.Image.Image:
    """Each of `count` instances, int32 [H, W] from 1, in its own colour over uint8 [H, W, 3], with white outlines.

    `hatch` paints stripes, whose direction differs between neighbours in number, so that colour is not needed.
    """
    colours = PIL.Image.fromarray(_palette(count)[labels - 1])
    mixed = np.array(PIL.Image.blend(PIL.Image.fromarray(rgb), colours, FILL))
    if hatch:
        bare = ~_stripes(labels)
        mixed[bare] = rgb[bare]
    return _outlined(mixed, borders(labels))


def paint_masks(
    rgb: NDArray[np.uint8], masks: NDArray[np.bool_], numbers: Sequence[int] | None = None
) -> PIL.Image.Image:
    """Masks bool [K, H, W] in colours over a photo, uint8 [H, W, 3], small ones on top, with white outlines.

    A mask has the colour of its number, from 0; None: 0 … K − 1.
    """
    coloured = range(len(masks)) if numbers is None else numbers
    number = np.zeros(rgb.shape[:2], np.int32)
    border = np.zeros(rgb.shape[:2], np.bool_)
    by_size = np.argsort(-masks.sum(axis=(1, 2)), kind="stable")
    for index in by_size:
        number[masks[index]] = coloured[index] + 1
        border |= borders(masks[index])
    colours = np.concatenate([np.zeros((1, 3), np.uint8), _palette(max(coloured, default=-1) + 1)])[number]
    mixed = np.array(PIL.Image.blend(PIL.Image.fromarray(rgb), PIL.Image.fromarray(colours), FILL))
    mixed[number == 0] = rgb[number == 0] // 2
    return _outlined(mixed, border)


def colour(number: int, value: float = 1.0) -> tuple[float, float, float]:
    """RGB in [0, 1] of an instance's number: hues by the golden ratio, so that consecutive ones differ."""
    return colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, value)


def borders(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """bool [H, W], where a label differs from that of the left or upper neighbour."""
    border = np.zeros(labels.shape, np.bool_)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    return border


def _outlined(picture: NDArray[np.uint8], border: NDArray[np.bool_]) -> PIL.Image.Image:
    """White lines along a border, as wide as a pen on the picture."""
    picture[maximum_filter(border, round(max(border.shape) / PEN) + 1)] = 255
    return PIL.Image.fromarray(picture)


def _palette(count: int) -> NDArray[np.uint8]:
    """The colours of numbers from 0, uint8 [count, 3]."""
    colours = np.array([colour(number) for number in range(count)]).reshape(-1, 3)
    levels: NDArray[np.uint8] = np.rint(colours * 255).astype(np.uint8)
    return levels


def _stripes(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the stripes of each instance lie: slanted, upright, slanted the other way, level, in turns by number."""
    pen = max(2, round(max(labels.shape) / PEN * 4))
    y, x = np.ogrid[: labels.shape[0], : labels.shape[1]]
    along = np.choose(labels % 4, np.broadcast_arrays(x + y, x + 0 * y, x - y, y + 0 * x))
    stripes: NDArray[np.bool_] = (along // pen) % 2 == 0
    return stripes
