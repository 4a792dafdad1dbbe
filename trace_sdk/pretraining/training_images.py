"""Training images: photos as they are and composed scenes, each batch a function of (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.errors import DatasetError, ImageError
from trace_sdk.images import FORMATS, MAX_PIXELS, PHOTO_SUFFIXES, read_image
from trace_sdk.pretraining.scenes import RGB, compose

SUFFIXES = PHOTO_SUFFIXES - {".gif"}  # most of those move
OF_PHOTO = "photo_sha256"  # text in a cut-out's PNG: of the photo's file


def list_photos(folders: Sequence[Path]) -> list[Path]:
    """All photos below the folders, sorted by name within each, without what is hidden (a name that begins with a dot).

    Raises DatasetError if a folder has none.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            wrong = "is a file, not a folder of photos" if folder.is_file() else "does not exist"
            raise DatasetError(f"{folder} {wrong}. Give the folder that holds the photos.")
        photos = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and file.is_file()
        )
        if not photos:
            raise DatasetError(f"No photos in {folder}. Give a folder that holds {', '.join(sorted(SUFFIXES))} files.")
        found += photos
    return found


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


def load_cutouts(folder: Path) -> dict[Path, Image.Image]:
    """A folder of RGBA cut-outs, with straight alpha. Raises DatasetError if one has no transparency."""
    files = list_photos([folder])
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(open_cutout, files), strict=True))


def open_cutout(file: Path) -> Image.Image:
    """One RGBA cut-out with straight alpha."""
    try:
        image = Image.open(file).convert("RGBA")
    except Exception as error:  # a decoder fed with damaged data raises anything
        raise DatasetError(f"Cannot read the cut-out {file}: {error}. Remove it or replace it.") from error
    if np.asarray(image.getchannel("A")).min() == 255:
        raise DatasetError(f"The cut-out {file} has no transparent pixel. Give RGBA images cut along the outline.")
    return image


def open_photo(file: Path) -> Image.Image:
    """One photo as RGB, see `read_image`. Raises DatasetError with the file's name if it cannot be read."""
    try:
        return Image.fromarray(read_image(file).rgb)
    except ImageError as error:
        raise DatasetError(f"{error} Remove it or replace it.") from error


def check_photos(files: Sequence[Path]) -> dict[Path, str]:
    """Decode every photo once: a damaged one is then said before a training, not when it is drawn, hours later.

    Returns:
        The sha256 of each file.

    Raises:
        DatasetError: some cannot be read; names them all.
    """
    with ThreadPoolExecutor() as pool:
        checked = dict(zip(files, pool.map(_check, files), strict=True))
    if damage := {file: answer for file, answer in checked.items() if isinstance(answer, ImageError)}:
        first, *others = damage
        also = f" Nor can {', '.join(map(str, others))}." if others else ""
        raise DatasetError(
            f"Of {len(checked)} photos {len(damage)} cannot be read. {damage[first]}{also} Remove them or replace them."
        )
    return {file: str(answer) for file, answer in checked.items()}


def _check(file: Path) -> str | ImageError:
    """The sha256 of a photo, or why it cannot be read."""
    with suppress(Exception):  # what is wrong, the full reading below says better
        data = file.read_bytes()
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height <= MAX_PIXELS:
                picture.draft(None, (1, 1))  # of a JPEG an eighth of each side: the same damage is found, in less time
            read_image(picture)
        return hashlib.sha256(data).hexdigest()
    try:
        read_image(file)
    except ImageError as error:
        return error
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
