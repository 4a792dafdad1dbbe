"""Write composed scenes as files: to label for distillation, or with instance ids to evaluate on.

python recipes/trace-small/compose_scenes.py WORK/train OUT --count 400
python recipes/trace-small/compose_scenes.py WORK/held-out OUT --count 60 --ids
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.atomic import make_folder
from trace_sdk.cli.console import run_script
from trace_sdk.pretraining.scenes import compose
from trace_sdk.pretraining.training_images import list_photos, load_cutouts, open_photo, random_crop


def main() -> None:
    """Scene k is a function of (seed, k) alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with cutouts/ and backgrounds/, from unpack.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--ids", action="store_true", help="also NAME.ids.png, for evaluation only")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    cutouts = list(load_cutouts(options.parts / "cutouts").values())
    backgrounds = list_photos([options.parts / "backgrounds"])
    make_folder(options.out)
    for number in range(options.count):
        rng = np.random.default_rng([options.seed, number])
        background = open_photo(backgrounds[rng.integers(len(backgrounds))])
        scene = compose(rng, cutouts, random_crop(rng, background, options.size))
        Image.fromarray(scene.rgb).save(options.out / f"scene-{number:04d}.png")
        if options.ids:
            Image.fromarray(scene.ids).save(options.out / f"scene-{number:04d}.ids.png")


if __name__ == "__main__":
    run_script(main)
