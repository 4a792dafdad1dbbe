"""Write composed scenes as files: to label for distillation, or with instance ids to evaluate on.

python recipes/trace-small/compose_scenes.py WORK/train OUT --count 400
python recipes/trace-small/compose_scenes.py WORK/held-out OUT --count 60 --ids
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from trace_sdk.cli.console import at_least, run_script
from trace_sdk.pictures import save_png
from trace_sdk.pretraining.cutouts import load_cutouts
from trace_sdk.pretraining.photos import list_photos, open_photo
from trace_sdk.pretraining.scenes import compose
from trace_sdk.pretraining.training_images import random_crop


def main() -> None:
    """Scene k is a function of (seed, k) alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with cutouts/ and backgrounds/, from unpack.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=at_least(1), required=True)
    parser.add_argument("--size", type=at_least(1), default=256)
    parser.add_argument("--seed", type=at_least(0), default=2026)
    parser.add_argument("--ids", action="store_true", help="also NAME.ids.png, for evaluation only")
    options = parser.parse_args()
    cutouts = list(load_cutouts(options.parts / "cutouts").values())
    backgrounds = list_photos([options.parts / "backgrounds"])
    for number in range(options.count):
        rng = np.random.default_rng([options.seed, number])
        background = open_photo(backgrounds[rng.integers(len(backgrounds))])
        scene = compose(rng, cutouts, random_crop(rng, background, options.size))
        save_png(Image.fromarray(scene.rgb), options.out / f"scene-{number:04d}.png")
        if options.ids:
            save_png(Image.fromarray(scene.ids), options.out / f"scene-{number:04d}.ids.png")


if __name__ == "__main__":
    run_script(main)
