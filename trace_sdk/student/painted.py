"""What is painted over a scene and ends no thing: patterns on its surfaces, shadows, reflections.

A student that sees these, and is told the edges of the scene without them, learns to tell a thing from its colours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter

from trace_sdk.pretraining.scenes import RGB

PATTERN = 0.5  # share of scenes on whose things lies the texture of another photo
EVERYWHERE = 0.2  # share of these where it lies on the whole scene
SHADOW = 0.4  # share of scenes with the shadow of a thing that is not seen
REFLECTION = 0.15  # share of scenes seen as through a window
DARKEST = 12.0  # added to a texture's values, so that black does not count without end


def paint(
    rng: np.random.Generator,
    rgb: RGB,
    ids: NDArray[np.uint8],
    crop: Callable[[], RGB],
    silhouette: Callable[[], Image.Image],
) -> RGB:
    """A scene with what ends no thing; the scene itself where nothing was drawn.

    Args:
        rgb: uint8 [S, S, 3]. ids: uint8 [S, S], 0 where nothing was pasted.
        crop: draws a piece of a photo, uint8 [S, S, 3]. silhouette: draws an RGBA cut-out.
    """
    painted = scene = rgb.astype(np.float32)
    if rng.random() < PATTERN and ids.any():
        surface = _surface(rng, ids)
        strength = rng.uniform(0.15, 0.5) if surface.all() else rng.uniform(0.3, 1)
        painted = (painted * np.exp(strength * _texture(rng, crop()) * surface[..., None])).astype(np.float32)
    if rng.random() < SHADOW:
        painted = _with_shadow(rng, painted, silhouette())
    if rng.random() < REFLECTION:
        light = crop().astype(np.float32) * np.float32(rng.uniform(0.15, 0.45))
        painted = (painted + light * (1 - np.minimum(painted, 255) / 255)).astype(np.float32)
    return rgb if painted is scene else np.clip(painted, 0, 255).astype(np.uint8)


def _surface(rng: np.random.Generator, ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Everything, all that was pasted, or one of these."""
    if rng.random() < EVERYWHERE:
        return np.ones(ids.shape, np.bool_)
    pasted = np.unique(ids[ids > 0])
    which = pasted if rng.random() < 0.5 else rng.choice(pasted, 1)
    return np.isin(ids, which)


def _texture(rng: np.random.Generator, photo: RGB) -> NDArray[np.float32]:
    """Log-ratio of a photo to its mean, [S, S, 1 or 3]: times a surface, the surface keeps its own light and shade."""
    values = photo.astype(np.float32) + np.float32(DARKEST)
    if rng.random() < 0.5:
        values = values.mean(2, keepdims=True)
    ratio = np.log(values / values.mean((0, 1)))
    if rng.random() < 0.5:  # small figures without the large ones
        ratio = ratio - gaussian_filter(ratio, (12, 12, 0))
    textured: NDArray[np.float32] = ratio
    return textured


def _with_shadow(rng: np.random.Generator, rgb: NDArray[np.float32], thing: Image.Image) -> NDArray[np.float32]:
    """Less light where a thing would stand between the scene and the sun, with a rim from sharp to soft."""
    side = len(rgb)
    alpha = np.asarray(thing.getchannel("A").resize((side, side)), np.float32) / 255
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4, 2) * side
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]]) / rng.uniform(0.5, 1.6)
    centre = np.full(2, side / 2)
    cast = affine_transform(alpha, turn, centre - turn @ (centre + shift), order=1)
    cast = gaussian_filter(cast, rng.uniform(0.3, 3))
    left = rng.uniform(0.35, 0.8) * rng.uniform(0.95, 1.05, 3)
    darker: NDArray[np.float32] = rgb * (1 - cast[..., None] * (1 - left)).astype(np.float32)
    return darker
