"""How good an engine's edges are before and after an export changed its numbers: ODS against boundaries that are known.

Without annotated photos the sample is drawn: textured shapes laid over each other by the scene composer of pretraining,
whose instance ids are exact. They say how much of the accuracy is lost, not how good an engine is on photos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from trace_sdk.evaluation.datasets import Dataset, Sample, instance_boundaries, open_dataset
from trace_sdk.evaluation.edges import count_edges, score_edges
from trace_sdk.export.pictures import spread
from trace_sdk.network_input import fit, unfit
from trace_sdk.pretraining.scenes import compose
from trace_sdk.pretraining.shapes import SIDE, cut_shape
from trace_sdk.thinning import thin_ridges

DRAWN, DRAWN_SIDE = 12, 256
EVALUATED = 200  # photos of a data set, at most
THRESHOLDS = 33
LIMITS = {"fp16": 0.002, "fp16-mixed": 0.002, "bf16": 0.01, "int8": 0.01}  # by which ODS may fall

Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # [1, H, W, 3], as the network takes it → [1, H, W]


@dataclass(frozen=True)
class OdsChange:
    """ODS of the float engine and of the exported one, on the same pictures.

    Attributes:
        before, after: in [0, 1].
        pictures: how many. sample: what they are. annotated: whether people marked their boundaries.
        limit: by which ODS may fall.
    """

    before: float
    after: float
    pictures: int
    sample: str
    annotated: bool
    limit: float

    @property
    def kept(self) -> bool:
        """Whether ODS fell by no more than the limit."""
        return self.before - self.after <= self.limit


def pictures_with_truth(folder: Path | None) -> tuple[Dataset, str]:
    """An annotated folder (`trace_sdk.evaluation.datasets`), else drawn scenes; and what to call it.

    Of a large folder EVALUATED pictures are taken, evenly spread.

    Raises:
        DatasetError: the folder holds no data set.
    """
    if folder is None:
        return drawn_scenes(DRAWN, DRAWN_SIDE), f"{DRAWN} drawn scenes"
    whole = open_dataset(folder)
    names = tuple(spread(whole.names, EVALUATED))
    return dataclasses.replace(whole, names=names), f"{len(names)} of {len(whole)} pictures of {folder}"


def drawn_scenes(count: int, side: int) -> Dataset:
    """Scenes of `side` pixels with exact boundaries, the same each time."""
    rng = np.random.default_rng(0)
    scenes = {}
    for number in range(count):
        shapes = [cut_shape(rng, _texture(rng, SIDE)) for _ in range(6)]
        scene = compose(rng, shapes, _texture(rng, side))
        name = f"drawn-{number}"
        scenes[name] = Sample(name, scene.rgb, (instance_boundaries(scene.ids),))
    return Dataset("drawn", Path(), "ids", tuple(scenes), scenes.__getitem__)


def ods(samples: Iterable[Sample], answer: Answer, size: int, padded: Callable[[int], int]) -> float:
    """Of a network that sees pictures as `EdgeDetector` shows them to it."""
    counts = []
    for sample in samples:
        pixels, height, width = fit(sample.rgb, size, padded)
        edges = unfit(answer(pixels[None])[0], height, width, sample.rgb.shape[:2])
        counts.append(count_edges(thin_ridges(edges), sample.boundaries, thresholds=THRESHOLDS))
    return score_edges(counts).ods


def _texture(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Blobs of two colours with grain, uint8 [side, side, 3]."""
    cells = rng.integers(2, 24)
    rough = PIL.Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8)).resize((side, side))
    share = np.asarray(rough, np.float32)[..., None] / 255
    colours = rng.uniform(20, 235, (2, 3))
    grain = rng.normal(0, rng.uniform(2, 12), (side, side, 3))
    levels = colours[0] + share * (colours[1] - colours[0]) * 0.5 + grain
    texture: NDArray[np.uint8] = np.clip(levels, 0, 255).astype(np.uint8)
    return texture
