"""Lessons that a student sets itself: what its edges cut out, pasted over other photos, with exact outlines.

No annotation is behind them. The cut-outs come from the student's own edges (`trace-sdk cutouts`) or are random shapes
of photos; where they were pasted is known to the pixel, whatever was cut out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.datasets import instance_boundaries
from trace_sdk.pretraining.cutouts import OF_PHOTO, load_cutouts
from trace_sdk.pretraining.photos import check_photos, list_photos, open_photo
from trace_sdk.pretraining.scenes import MOST, RGB, compose
from trace_sdk.pretraining.shapes import SIDE, cut_shape
from trace_sdk.pretraining.training_images import random_crop
from trace_sdk.student.painted import paint

SHAPES = 0.3  # share of scenes of random shapes
ENLARGED = 1.1  # times as large as they are photos and cut-outs are shown at most, so that all is as sharp
AT_HOME = 0.5  # share of the other scenes whose cut-outs are of the photo they are pasted over, in its light
BLURRED = 0.5  # share of scenes that are blurred
BLUR = (0.3, 1.0)  # σ, pixels: photos out of focus, or seen larger than they are
JPEG = 0.5  # share of scenes that were a JPEG file: what was pasted and what was there get the same artefacts
QUALITY = (40, 96)  # of these files
RIM = 1.0  # σ of the outline's ridge, pixels
PEAK = 0.4  # about 1/√(2π): what that Gaussian leaves of a straight line, a pixel wide
NEARER = 0.9  # of the way from a shape's mean colour to the background's, at most
MARGIN = 32  # pixels by which a scene is larger than what is seen of it


class Scenes(NamedTuple):
    """A batch: images float [B, 3, S, S] in [−1, 1]; over the outlines of what was pasted ridges [B, S, S] in [0, 1].

    plain: the images without what was painted over them, whose edges are the same. inside: bool [B, S, S], where
    something was pasted.
    """

    images: Tensor
    plain: Tensor
    ridges: Tensor
    inside: Tensor


class OwnScenes:
    """Scenes of own cut-outs over photos, each batch a function of (seed, step) alone.

    Every folder counts the same, however many pictures it has: a few varied photos are not lost among many alike. Half
    of the photos whose cut-outs are among those given get these back, in another place, in their own light: as sharp
    and as noisy as what is around them, and beside their like.

    Args:
        photos: folders of photos, backgrounds and material of shapes. cutouts: folders of RGBA cut-outs; `homes` says
            which photo each came from.

    Raises:
        DatasetError: no photos or cut-outs, one cannot be read, or a cut-out may be of several photos.
    """

    def __init__(self, photos: Sequence[Path], cutouts: Sequence[Path], seed: int) -> None:
        self._photos = [list_photos([folder]) for folder in photos]
        loaded = [load_cutouts(folder) for folder in cutouts]
        self._cutouts = [list(images.values()) for images in loaded]
        every_photo = list(dict.fromkeys(chain.from_iterable(self._photos)))
        self._of_photo = homes(check_photos(every_photo), chain.from_iterable(images.items() for images in loaded))
        self._seed = seed

    def batch(self, step: int, count: int, size: int) -> Scenes:
        """`count` scenes of `size` px a side."""
        rng = np.random.default_rng([self._seed, step])
        scenes = (self._scene(rng, np.random.default_rng([self._seed, step, i]), size) for i in range(count))
        images, plain, ridges, inside = (torch.from_numpy(np.stack(values)) for values in zip(*scenes, strict=True))
        return Scenes(_pixels(images), _pixels(plain), ridges, inside)

    def _scene(
        self, rng: np.random.Generator, brush: np.random.Generator, size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        whole = size + MARGIN
        photo = self._photo(rng)
        background = random_crop(rng, open_photo(photo), whole, ENLARGED)
        own = self._of_photo.get(photo, [])
        at_home = False
        if rng.random() < SHAPES:
            cutouts = self._shapes(rng, background)
        elif rng.random() < AT_HOME and own:
            cutouts, at_home = own, True
        else:
            cutouts = self._drawn(rng)
        scene = compose(rng, cutouts, background, ENLARGED, own_light=not at_home)
        ridge = np.clip(gaussian_filter(instance_boundaries(scene.ids).astype(np.float32), RIM) / PEAK, 0, 1)
        top, left = rng.integers(0, MARGIN + 1, 2)
        seen = np.s_[top : top + size, left : left + size]
        blur = rng.uniform(*BLUR) if rng.random() < BLURRED else 0.0
        quality = int(rng.integers(*QUALITY)) if rng.random() < JPEG else None

        def taken(rgb: RGB) -> NDArray[np.float32]:
            photo = gaussian_filter(rgb[seen].astype(np.float32), (blur, blur, 0))
            return _as_jpeg(photo, quality) if quality is not None else photo

        plain = taken(scene.rgb)
        painted = paint(brush, scene.rgb, scene.ids, partial(self._crop, brush, whole), lambda: self._drawn(brush)[0])
        image = plain if painted is scene.rgb else taken(painted)
        return image, plain, ridge[seen], scene.ids[seen] > 0

    def _drawn(self, rng: np.random.Generator) -> list[Image.Image]:
        """As many cut-outs as a scene shows, each of a folder drawn first."""
        folders = [self._cutouts[i] for i in rng.integers(len(self._cutouts), size=MOST)]
        return [folder[rng.integers(len(folder))] for folder in folders]

    def _shapes(self, rng: np.random.Generator, background: RGB) -> list[Image.Image]:
        """Shapes of photos whose mean colours come near the background's: there, texture alone tells them apart."""
        shapes = []
        for _ in range(int(rng.integers(2, 8))):
            crop = self._crop(rng, SIDE).astype(np.float32)
            nearer = crop + rng.uniform(0, NEARER) * (background.mean((0, 1)) - crop.mean((0, 1)))
            shapes.append(cut_shape(rng, np.clip(nearer, 0, 255).astype(np.uint8)))
        return shapes

    def _crop(self, rng: np.random.Generator, size: int) -> RGB:
        return random_crop(rng, open_photo(self._photo(rng)), size, ENLARGED)

    def _photo(self, rng: np.random.Generator) -> Path:
        folder = self._photos[rng.integers(len(self._photos))]
        return folder[rng.integers(len(folder))]


def homes(photos: dict[Path, str], cutouts: Iterable[tuple[Path, Image.Image]]) -> dict[Path, list[Image.Image]]:
    """The cut-outs of each photo that has some, in their order.

    One that `trace-sdk cutouts` wrote carries the sha256 of its photo's file. Of another its name tells: PHOTO-1.png is
    of PHOTO.jpg. Copies of a photo are as good as itself.

    Args:
        photos: each with the sha256 of its file.

    Raises:
        DatasetError: photos that differ have the name that a cut-out tells.
    """
    alike, called = defaultdict(list), defaultdict(list)
    for photo, digest in photos.items():
        alike[digest].append(photo)
        called[photo.stem].append(photo)
    found: dict[Path, list[Image.Image]] = defaultdict(list)
    for file, image in cutouts:
        own = alike[image.info[OF_PHOTO]] if OF_PHOTO in image.info else called[file.stem.rpartition("-")[0]]
        if len({photos[photo] for photo in own}) > 1:
            raise DatasetError(
                f"{file} may be of any of {', '.join(map(str, own))}, which differ. Make the cut-outs again in a new "
                "folder (`trace-sdk cutouts`), so that they carry which photo they are of, or rename the photos."
            )
        for photo in own:
            found[photo].append(image)
    return found


def _pixels(images: Tensor) -> Tensor:
    """[B, S, S, 3] of 0 to 255 → [B, 3, S, S] in [−1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _as_jpeg(rgb: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """What a JPEG file keeps of an image [S, S, 3], values 0–255."""
    file = BytesIO()
    Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32)
