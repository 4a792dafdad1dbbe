"""Photos in folders: found, checked, opened."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from trace_sdk.errors import DatasetError, ImageError
from trace_sdk.folders import files_below
from trace_sdk.images import FORMATS, MAX_PIXELS, PHOTO_SUFFIXES, read_image

SUFFIXES = PHOTO_SUFFIXES - {".gif"}  # most of those move


def list_photos(folders: Sequence[Path]) -> list[Path]:
    """All photos below the folders, sorted by name within each, without what is hidden (a name that begins with a dot).

    Raises DatasetError if a folder has none.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            wrong = "is a file, not a folder of photos" if folder.is_file() else "does not exist"
            raise DatasetError(f"{folder} {wrong}. Give the folder that holds the photos.")
        photos = sorted(file for file in files_below(folder) if file.suffix.lower() in SUFFIXES and file.is_file())
        if not photos:
            raise DatasetError(f"No photos in {folder}. Give a folder that holds {', '.join(sorted(SUFFIXES))} files.")
        found += photos
    return found


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
