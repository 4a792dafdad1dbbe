"""Unpack scenes256.npz into folders that `trace-sdk pretrain` reads, the last tenth apart for evaluation.

    python recipes/trace-small/unpack.py scenes256.npz data/

writes data/train/{cutouts,backgrounds}/*.png and data/held-out/{cutouts,backgrounds}/*.png.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.cli.console import run_script
from trace_sdk.errors import DatasetError
from trace_sdk.pictures import save_png

CROPS_PER_PHOTO = 3


def unpack(archive: Path, out: Path) -> None:
    """Write each cut-out with straight alpha, cropped to what is not clear, and each background as it is."""
    if not archive.is_file():
        raise DatasetError(f"{archive} does not exist. Make it with pack_scenes.py.")
    try:
        data = np.load(archive, allow_pickle=False)
        cutouts, backgrounds = data["sprites"], data["backs"]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{archive} is not an archive that pack_scenes.py wrote. Make it again.") from error
    for number, sprite in enumerate(cutouts):
        premultiplied = sprite.transpose(1, 2, 0).astype(np.float32)
        alpha = premultiplied[..., 3:]
        straight = premultiplied[..., :3] * 255 / np.maximum(alpha, 1)
        rgba = np.concatenate([np.clip(straight, 0, 255), alpha], axis=-1).astype(np.uint8)
        image = Image.fromarray(rgba, "RGBA")
        part = "train" if number < len(cutouts) - len(cutouts) // 10 else "held-out"
        save_png(image.crop(image.getchannel("A").getbbox()), out / part / "cutouts" / f"{number:04d}.png")
    photos = len(backgrounds) // CROPS_PER_PHOTO
    for number, background in enumerate(backgrounds):
        photo = number // CROPS_PER_PHOTO  # all crops of one photo go to one side
        part = "train" if photo < photos - (photos + 9) // 10 else "held-out"
        save_png(Image.fromarray(background.transpose(1, 2, 0)), out / part / "backgrounds" / f"{number:04d}.png")


def main() -> None:
    """All of the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="scenes256.npz, from pack_scenes.py")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    unpack(options.archive, options.out)


if __name__ == "__main__":
    run_script(main)
