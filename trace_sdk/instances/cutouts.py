"""Things cut out of a photo along its edges, as RGBA pictures: what the student composes its own lessons of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import find_objects, gaussian_filter

from trace_sdk.edge_map import EdgeMap

CUTS = (0.7, 1.0)  # cuts through the hierarchy, shares of the engine's threshold: things and their parts
CLEAN = 0.5  # score of a clean outline, as a share of that threshold
AREA = (600, 0.3)  # smallest in pixels, largest as a share of the photo
SHORTEST = 60  # pixels of the longer side
FILLED = 0.35  # share of its box that a thing fills
SOFT = 0.6  # σ of the alpha's ramp, pixels; drawn in, so that the outside's colour stays out


@dataclass(frozen=True)
class Cutout:
    """image: RGBA with straight alpha. box: left, top, right, bottom in the photo. score: see `Instances`, [0, 1]."""

    image: PIL.Image.Image
    box: tuple[int, int, int, int]
    score: float


def cut_out(edges: EdgeMap, min_score: float | None = None) -> list[Cutout]:
    """The instances of a photo that look like things: whole in the picture, compact, with a clean outline.

    Args:
        edges: of the photo. min_score: of the outline, in [0, 1]; None: half the engine's threshold.

    Returns:
        best first; one that several cuts of the hierarchy agree on is there once.
    """
    found: dict[tuple[int, int, int, int], Cutout] = {}
    least = CLEAN * edges.threshold if min_score is None else min_score
    for share in CUTS:
        instances = edges.instances(share * edges.threshold)
        height, width = instances.labels.shape
        for number, (rows, columns) in enumerate(find_objects(instances.labels), start=1):
            score, area = float(instances.scores[number - 1]), int(instances.areas[number - 1])
            box = (columns.start, rows.start, columns.stop, rows.stop)
            touches_rim = box[0] == 0 or box[1] == 0 or box[2] == width or box[3] == height
            sides = (box[2] - box[0], box[3] - box[1])
            if touches_rim or score < least or not AREA[0] <= area <= AREA[1] * height * width:
                continue
            if max(sides) < SHORTEST or area < FILLED * sides[0] * sides[1]:
                continue
            if box not in found or found[box].score < score:
                mask = instances.labels[rows, columns] == number
                found[box] = Cutout(_with_alpha(instances.rgb[rows, columns], mask), box, score)
    return sorted(found.values(), key=lambda cutout: -cutout.score)


def _with_alpha(rgb: NDArray[np.uint8], mask: NDArray[np.bool_]) -> PIL.Image.Image:
    soft = gaussian_filter(np.pad(mask, 1).astype(np.float32), SOFT)
    alpha = np.clip(1.6 * soft - 0.4, 0, 1) * 255
    framed = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return PIL.Image.fromarray(np.dstack([framed, alpha.astype(np.uint8)]), "RGBA")
