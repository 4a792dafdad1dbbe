"""Cut-outs, RGBA pictures that scenes are composed of, as `trace-sdk cutouts` or a drawing program wrote them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.errors import DatasetError
from trace_sdk.pretraining.photos import list_photos

OF_PHOTO = "photo_sha256"  # text in a cut-out's PNG: of the photo's file


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
