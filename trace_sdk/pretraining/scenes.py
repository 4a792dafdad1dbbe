"""Scenes composed on the fly: photo cut-outs over photos, with exact instance ids.

Several instances of one object side by side, occlusion, soft shadows, colour jitter. The ids serve evaluation
only; no training step reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

RGB = NDArray[np.uint8]

MOST = 7  # instances in a scene


@dataclass(frozen=True)
class Scene:
    """`rgb` uint8 [S, S, 3]; `ids` uint8 [S, S], 0 = background, 1… = instances, front ones on top."""

    rgb: RGB
    ids: NDArray[np.uint8]


def compose(
    rng: np.random.Generator,
    cutouts: list[Image.Image],
    background: RGB,
    enlarged: float = inf,
    *,
    own_light: bool = True,
) -> Scene:
    """Lay one to seven instances of RGBA cut-outs over `background` uint8 [S, S, 3].

    Half of the scenes show several instances of one object side by side, the case that edges must tell apart
    and semantics cannot.

    Args:
        enlarged: how many times as large as they are cut-outs may be shown: above 1 blur gives them away.
        own_light: each instance in a light of its own; else all in that of the background.
    """
    size = background.shape[0]
    canvas = background.astype(np.float32)
    if own_light:
        canvas = jitter(rng, canvas)
    ids = np.zeros((size, size), np.uint8)
    same = rng.random() < 0.5
    count = int(rng.integers(2, 6)) if same else int(rng.integers(1, MOST + 1))
    shared = cutouts[rng.integers(len(cutouts))]
    longest = min(size * rng.uniform(0.28, 0.55), enlarged * max(shared.size))
    centre = rng.uniform(0.25, 0.75, 2) * size
    heading = rng.uniform(0, 2 * np.pi)
    step = np.array([np.cos(heading), np.sin(heading)])
    for number in range(1, count + 1):
        if same:
            place = centre + step * longest * rng.uniform(0.45, 0.8) * (number - (count + 1) / 2)
            sprite = _pose(rng, shared, longest * rng.uniform(0.9, 1.1), tilt=8)
        else:
            place = rng.uniform(0.1, 0.9, 2) * size
            cutout = cutouts[rng.integers(len(cutouts))]
            sprite = _pose(rng, cutout, min(size * rng.uniform(0.2, 0.65), enlarged * max(cutout.size)), tilt=20)
        _paste(rng, canvas, ids, sprite, place, number, own_light)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), ids)


def jitter(rng: np.random.Generator, rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Random brightness, contrast and colour cast on values 0–255, any shape [..., 3]."""
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.93, 1.07, 3)
    mean = rgb.mean(axis=(0, 1))
    jittered: NDArray[np.float32] = ((rgb - mean) * rng.uniform(0.8, 1.2) + mean * gain).astype(np.float32)
    return jittered


def _pose(rng: np.random.Generator, cutout: Image.Image, longest: float, tilt: float) -> Image.Image:
    scale = longest / max(cutout.size)
    sprite = cutout.resize(
        (max(2, round(cutout.width * scale)), max(2, round(cutout.height * scale))), Image.Resampling.BICUBIC
    )
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BILINEAR, expand=True)


def _paste(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    ids: NDArray[np.uint8],
    sprite: Image.Image,
    centre: NDArray[np.float64],
    number: int,
    own_light: bool,
) -> None:
    """Shadow first, then the sprite; both cut at the canvas's border."""
    pixels = np.asarray(sprite, np.float32)
    alpha = pixels[..., 3] / 255
    colour = np.clip(jitter(rng, pixels[..., :3]), 0, 255) if own_light else pixels[..., :3]
    top, left = round(centre[1] - alpha.shape[0] / 2), round(centre[0] - alpha.shape[1] / 2)
    if rng.random() < 0.6:
        blur = max(alpha.shape) * 0.04
        soft = np.asarray(sprite.getchannel("A").filter(ImageFilter.GaussianBlur(blur)), np.float32) / 255
        shift = rng.uniform(-0.08, 0.08, 2) * max(alpha.shape)
        _blend(
            canvas,
            soft * rng.uniform(0.2, 0.5),
            np.zeros(3, np.float32),
            top + round(shift[0]),
            left + round(shift[1]),
        )
    window, part = _blend(canvas, alpha, colour, top, left)
    ids[window][alpha[part] > 0.5] = number


def _blend(
    canvas: NDArray[np.float32], alpha: NDArray[np.floating[Any]], colour: NDArray[np.float32], top: int, left: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    bottom, right = min(top + alpha.shape[0], canvas.shape[0]), min(left + alpha.shape[1], canvas.shape[1])
    window = (slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0)))
    part = (slice(max(-top, 0), max(bottom - top, 0)), slice(max(-left, 0), max(right - left, 0)))
    weight = alpha[part][..., None]
    canvas[window] += weight * ((colour[part] if colour.ndim == 3 else colour) - canvas[window])
    return window, part
