"""Random shapes cut out of photos: outlines that are exact, of things that never were."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.pretraining.scenes import RGB

SIDE = 160  # pixels of the pictures that shapes are cut from
BLOB, POLYGON = 0.55, 0.3  # shares; the rest are wavy strips


def cut_shape(rng: np.random.Generator, rgb: RGB) -> Image.Image:
    """A blob, a polygon or a strip of `rgb`, uint8 [S, S, 3], as RGBA with a soft rim."""
    distance = signed_distance(rng, rgb.shape[0])
    alpha = np.clip(0.5 - distance / rng.uniform(0.8, 2.4), 0, 1) * 255
    return Image.fromarray(np.dstack([rgb, alpha.astype(np.uint8)]), "RGBA")


def signed_distance(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """About the distance in pixels to the outline of a shape inside a square of `size`, negative inside: [S, S]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - (size - 1) / 2
    radius, stretch, turn = 0.33 * size, math.exp(rng.uniform(-0.45, 0.45)), rng.uniform(0, math.pi)
    u = (x * math.cos(turn) + y * math.sin(turn)) / stretch
    v = (y * math.cos(turn) - x * math.sin(turn)) * stretch
    kind = rng.random()
    if kind < BLOB:
        angle, rim = np.arctan2(v, u), np.ones((size, size))
        for wave in range(1, 6):
            rim += rng.normal(0, 0.16 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * math.pi))
        distance = np.hypot(u, v) - radius * np.clip(rim, 0.25, 1.4)
    elif kind < BLOB + POLYGON:
        corners = int(rng.integers(3, 7))
        angles = 2 * math.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners
        sides = radius * rng.uniform(0.6, 1.1, corners)
        distance = np.max(
            [u * math.cos(angle) + v * math.sin(angle) - side for angle, side in zip(angles, sides, strict=True)], 0
        )
    else:
        bend = 0.3 * radius * np.sin(u / radius * rng.uniform(0.5, 2) + rng.uniform(0, 2 * math.pi))
        distance = np.maximum(np.abs(v + bend) - radius * rng.uniform(0.15, 0.4), np.abs(u) - 1.3 * radius)
    signed: NDArray[np.float32] = distance.astype(np.float32)
    return signed
