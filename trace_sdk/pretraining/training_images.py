"""Training images: photos as they are and composed scenes, each batch a function of (seed, step) alone."""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.pretraining.cutouts import load_cutouts
from trace_sdk.pretraining.photos import check_photos, list_photos, open_photo
from trace_sdk.pretraining.scenes import RGB, compose


def random_crop(rng: np.random.Generator, photo: Image.Image, size: int, enlarged: float = inf) -> RGB:
    """A square crop of 50–100 % of the short side, resized to `size`, mirrored half of the time: [S, S, 3].

    Args:
        enlarged: how many times as large as it is the photo may be shown; where it is too small for that, whole.
    """
    short = min(photo.size)
    side = max(1, round(short * rng.uniform(min(1.0, max(0.5, size / enlarged / short)), 1.0)))
    left, top = rng.integers(0, photo.width - side + 1), rng.integers(0, photo.height - side + 1)
    box = (int(left), int(top), int(left) + side, int(top) + side)
    crop = np.asarray(photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


class TrainingImages:
    """Half composed scenes, half photos as they are; every batch is a function of (seed, step) alone.

    Args:
        photos: folders of photos.
        cutouts: folder of RGBA cut-outs, or None for photos only.
        backgrounds: folder of photos behind the cut-outs; None takes `photos`.

    Raises:
        DatasetError: no photos or cut-outs, or one cannot be read.
    """

    def __init__(self, photos: list[Path], cutouts: Path | None, backgrounds: Path | None, seed: int) -> None:
        self._photos = list_photos(photos)
        self._cutouts = list(load_cutouts(cutouts).values()) if cutouts else []
        self._backgrounds = list_photos([backgrounds]) if backgrounds else self._photos
        check_photos(list(dict.fromkeys([*self._photos, *self._backgrounds])))
        self._seed = seed

    def batch(self, step: int, count: int, size: int) -> RGB:
        """uint8 [count, size, size, 3] for this step, the same whenever asked."""
        rng = np.random.default_rng([self._seed, step])
        return np.stack([self._one(rng, size) for _ in range(count)])

    def _one(self, rng: np.random.Generator, size: int) -> RGB:
        if self._cutouts and rng.random() < 0.5:
            file = self._backgrounds[rng.integers(len(self._backgrounds))]
            return compose(rng, self._cutouts, random_crop(rng, open_photo(file), size)).rgb
        return random_crop(rng, open_photo(self._photos[rng.integers(len(self._photos))]), size)
