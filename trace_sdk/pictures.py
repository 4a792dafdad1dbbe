"""Pictures for people, as JPEG and as PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING

from trace_sdk.atomic import write_bytes
from trace_sdk.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 65_500  # pixels a side, of libjpeg


def write_jpeg(picture: Image, file: IO[bytes], *, quality: int = 92) -> None:
    """Into an open binary file. Raises ImageError if a side of the picture is longer than a JPEG's."""
    if max(picture.size) > LONGEST:
        raise ImageError(
            f"A JPEG has at most {LONGEST:,} pixels a side, this picture is {picture.width}x{picture.height}. "
            "Cut the photo up."
        )
    picture.save(file, "JPEG", quality=quality)


def png_bytes(picture: Image) -> bytes:
    """The PNG file of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def save_png(picture: Image, file: Path) -> None:
    """Write a PNG, whole or not at all. Raises OutputError."""
    write_bytes(file, png_bytes(picture))
