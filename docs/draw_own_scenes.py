"""Draw method.md's pictures of self-training: what an engine cuts out of photos, and scenes of these.

python docs/draw_own_scenes.py examples/photos -o docs/pictures
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk import EdgeDetector
from trace_sdk.atomic import write_whole
from trace_sdk.cli.console import run_script
from trace_sdk.instances.cutouts import cut_out
from trace_sdk.pretraining.photos import list_photos
from trace_sdk.student.own_scenes import OwnScenes

CELL = 92  # pixels a side of a cut-out, with its margin
COLUMNS = 11  # cut-outs of a photo, the best
SCENES = 6  # in a row, of as many pixels a side as below
SIDE = 256


def draw_cutouts(cutouts: list[list[Image.Image]]) -> Image.Image:
    """A row for each photo, on white."""
    sheet = Image.new("RGBA", (COLUMNS * CELL, len(cutouts) * CELL), "white")
    for row, images in enumerate(cutouts):
        for column, image in enumerate(images[:COLUMNS]):
            small = image.copy()
            small.thumbnail((CELL - 12, CELL - 12))
            place = (column * CELL + (CELL - small.width) // 2, row * CELL + (CELL - small.height) // 2)
            sheet.alpha_composite(small, place)
    return sheet.convert("RGB").quantize(128, dither=Image.Dither.NONE)


def draw_scenes(scenes: OwnScenes, rows: int) -> Image.Image:
    """Scenes, and under each what is asked for, black on white."""
    strips = []
    for row in range(rows):
        images, _, ridges, _ = scenes.batch(row, SCENES, SIDE)
        pictures = (images.permute(0, 2, 3, 1) * 127.5 + 127.5).numpy()
        asked = (255 * (1 - ridges[..., None].expand(-1, -1, -1, 3))).numpy()
        strips += [np.concatenate(list(part), axis=1) for part in (pictures, asked)]
    whole = Image.fromarray(np.concatenate(strips).astype(np.uint8))
    return whole.resize((whole.width // 3 * 2, whole.height // 3 * 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Cut out, compose, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--engine", default="trace-nano", help="bundled name or .onnx file  [default: trace-nano]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    photos, detector = list_photos([options.photos]), EdgeDetector(options.engine)
    found = [[one.image for one in cut_out(detector.run(photo))] for photo in photos]
    with tempfile.TemporaryDirectory() as folder:
        for photo, images in zip(photos, found, strict=True):
            for number, image in enumerate(images, start=1):
                image.save(Path(folder, f"{photo.stem}-{number}.png"))
        scenes = OwnScenes([options.photos], [Path(folder)], options.seed)
        with write_whole(options.out / "own-scenes.jpg") as file:
            draw_scenes(scenes, 2).save(file, "JPEG", quality=80)
    with write_whole(options.out / "cutouts.png") as file:
        draw_cutouts(found).save(file, "PNG", optimize=True)


if __name__ == "__main__":
    run_script(main)
