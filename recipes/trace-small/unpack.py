"""Unpack scenes256.npz into folders that `trace-sdk pretrain` reads, the last tenth apart for evaluation.

    python recipes/trace-small/unpack.py scenes256.npz data/

writes data/train/{cutouts,backgrounds}/*.png and data/held-out/{cutouts,backgrounds}/*.png.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CROPS_PER_PHOTO = 3


def unpack(archive: Path, out: Path) -> None:
    """Write each cut-out with straight alpha, cropped to what is not clear, and each background as it is."""
    data = np.load(archive, allow_pickle=False)
    cutouts, backgrounds = data["sprites"], data["backs"]
    for number, sprite in enumerate(cutouts):
        premultiplied = sprite.transpose(1, 2, 0).astype(np.float32)
        alpha = premultiplied[..., 3:]
        straight = premultiplied[..., :3] * 255 / np.maximum(alpha, 1)
        rgba = np.concatenate([np.clip(straight, 0, 255), alpha], axis=-1).astype(np.uint8)
        image = Image.fromarray(rgba, "RGBA")
        part = "train" if number < len(cutouts) - len(cutouts) // 10 else "held-out"
        _save(image.crop(image.getchannel("A").getbbox()), out / part / "cutouts" / f"{number:04d}.png")
    photos = len(backgrounds) // CROPS_PER_PHOTO
    for number, background in enumerate(backgrounds):
        photo = number // CROPS_PER_PHOTO  # all crops of one photo go to one side
        part = "train" if photo < photos - (photos + 9) // 10 else "held-out"
        _save(Image.fromarray(background.transpose(1, 2, 0)), out / part / "backgrounds" / f"{number:04d}.png")


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
