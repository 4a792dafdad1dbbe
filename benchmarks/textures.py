"""Edges drawn on plain textures, where no instance ends: grass, bricks, fabric, ground.

    apt-get download ufoai-textures && dpkg-deb -x ufoai-textures_*.deb x
    unzip x/usr/share/games/ufoai/base/0textures.pk3 -d TEXTURES
    .venv/bin/python benchmarks/textures.py TEXTURES --engine trace-nano -o benchmarks/results/textures.json

The photos of TEXTURES are those of a Debian package of game textures (CC BY-SA, GPL; not in the source tree), and
three come with scikit-image. None was trained on. Given for each method, over all pixels: the mean of its thinned soft
map; the mean of the map as it is; and the share drawn at its threshold, that of Canny's and the gradient's best ODS on
coco_val and an engine's own. The first and the last also as a multiple of Canny's: soft maps have scales of
their own, so the last says more about what people would see. A method that sees nothing has 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trace_sdk import EdgeDetector
from trace_sdk.atomic import write_text
from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.baselines import canny, lab_gradient
from trace_sdk.machine import commit
from trace_sdk.thinning import thin_ridges

RGB = NDArray[np.uint8]
Edges = NDArray[np.float32]
THRESHOLDS = {"canny": 0.92, "lab-gradient": 0.60}  # of their best ODS on coco_val (quality.json)
LONGEST = 512
FILES = {
    "grass": [
        "tex_ctp1/grass_g_4.jpg",
        "tex_ctp1/grass_g_7.jpg",
        "tex_ctp1/grass_g_8.jpg",
        "tex_nature/grass_mowed_dry_a.jpg",
        "tex_nature/grass_mowed_green_b.jpg",
        "tex_nature/grass_tall_dry_a.jpg",
        "tex_nature/grass_tall_green_b.jpg",
        "tex_nature/grass_lush.png",
    ],
    "bricks": [
        "tex_buildings/wall_brick01.png",
        "tex_ctp1/bricks_r_3.jpg",
        "tex_mattn/wall_bricks001.jpg",
        "tex_mattn/wall_bricks002.jpg",
        "tex_mattn/wall_bricks005.jpg",
        "tex_trak/trak4_brick2a.png",
    ],
    "fabric": [
        "tex_buildings/carpet008.png",
        "tex_buildings/carpet021.png",
        "tex_buildings/carpet025.png",
        "tex_buildings/carpet027.png",
        "tex_buildings/carpet028.png",
        "tex_buildings/carpet029.png",
        "tex_buildings/carpet031.png",
    ],
    "ground": ["tex_mattn/straw.jpg", "tex_nature/sand.jpg", "tex_ctp1/sand_s_1.jpg"],
}
SKIMAGE = {"grass": ["grass"], "bricks": ["brick"], "ground": ["gravel"]}


def textures(folder: Path) -> dict[str, list[RGB]]:
    """Each material's photos, uint8 [H, W, 3], at most 512 px a side.

    Raises:
        DatasetError: one is missing or unreadable.
    """
    found: dict[str, list[RGB]] = {}
    for material, names in FILES.items():
        photos = [Image.fromarray(getattr(skimage.data, name)()) for name in SKIMAGE.get(material, [])]
        for name in names:
            try:
                photos.append(Image.open(folder / "textures" / name))
            except (OSError, UnidentifiedImageError) as error:
                raise DatasetError(f"{folder}/textures/{name}: {error}. See the head of this script.") from error
        found[material] = [as_seen(photo) for photo in photos]
    return found


def as_seen(photo: Image.Image) -> RGB:
    """RGB, at most 512 px a side."""
    photo = photo.convert("RGB")
    photo.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(photo)


def densities(photos: list[RGB], detect: Callable[[RGB], Edges], threshold: float) -> dict[str, float]:
    """Means over `photos`: of the thinned map, of the map as it is, and of what is drawn at `threshold`."""
    maps = [detect(photo) for photo in photos]
    thinned = [thin_ridges(edges) for edges in maps]
    return {
        "thinned": float(np.mean([edges.mean() for edges in thinned])),
        "mean": float(np.mean([edges.mean() for edges in maps])),
        "drawn": float(np.mean([(edges >= threshold).mean() for edges in thinned])),
    }


def main() -> None:
    """One row a method and material, as text and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("textures", type=Path)
    parser.add_argument("--engine", action="append", default=[])
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    found = textures(options.textures)
    methods: dict[str, tuple[Callable[[RGB], Edges], float]] = {
        "canny": (canny, THRESHOLDS["canny"]),
        "lab-gradient": (lab_gradient, THRESHOLDS["lab-gradient"]),
    }
    for engine in options.engine:
        detector = EdgeDetector(engine)
        methods[engine] = (lambda rgb, run=detector.run: run(rgb).probability, detector.info["threshold"])
    rows = [
        {"method": name, "material": material, "photos": len(photos), **densities(photos, detect, threshold)}
        for name, (detect, threshold) in methods.items()
        for material, photos in found.items()
    ]
    by_canny = {row["material"]: row for row in rows if row["method"] == "canny"}
    print(f"{'method':14} {'material':8} thinned (× Canny's)  mean   drawn (× Canny's)")
    for row in rows:
        canny_row = by_canny[row["material"]]
        row |= {f"{key}_of_canny": row[key] / canny_row[key] for key in ("thinned", "drawn")}
        print(
            f"{row['method']:14} {row['material']:8} {row['thinned']:.4f} ({row['thinned_of_canny']:.2f})"
            f"      {row['mean']:.4f}  {row['drawn']:.4f} ({row['drawn_of_canny']:.2f})"
        )
    write_text(options.out, json.dumps({"commit": commit(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
