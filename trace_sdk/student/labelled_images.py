"""Photos with their ternary labels, as training crops: a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trace_sdk.errors import DatasetError
from trace_sdk.images import read_image
from trace_sdk.labelling.images import Where, find_images
from trace_sdk.labelling.states import label_file
from trace_sdk.student.snapping import snap
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.pseudo_labels import UNCERTAIN, standard_scores


class LabelledImages:
    """The images that have a label file below `labels`.

    Args:
        images: what `trace-sdk label` was given: folders, patterns, lists, COCO files or tars; see `find_images`.

    Raises:
        DatasetError: no image has a label.
    """

    def __init__(self, images: Where | Iterable[Where], labels: Path, seed: int) -> None:
        found = find_images(images)
        self.pairs = [(image, file) for image in found if (file := label_file(labels, image.name)).is_file()]
        if not self.pairs:
            raise DatasetError(
                f"None of {len(found)} photos has a label below {labels}. Run `trace-sdk label PHOTOS -o {labels}`."
            )
        self._seed = seed

    def batch(self, step: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops of side `size`, mirrored half of the time.

        Returns:
            images float [count, 3, size, size] in [−1, 1], labels int8 [count, size, size], and graded edges float
            [count, size, size] in [0, 1]; both snapped, see `snapping`.
        """
        rng = np.random.default_rng([self._seed, step])
        images, labels, graded = zip(*(self._crop(rng, size) for _ in range(count)), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(graded))

    def _crop(
        self, rng: np.random.Generator, size: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32]]:
        named, file = self.pairs[rng.integers(len(self.pairs))]
        # As the teacher saw it: upright by EXIF, alpha on white.
        photo, label = Image.fromarray(read_image(named.read(), named.name).rgb), load_label(file)
        short = min(photo.size)
        side = min(short, round(short * rng.uniform(0.5, 1.0)))
        left, top = int(rng.integers(0, photo.width - side + 1)), int(rng.integers(0, photo.height - side + 1))
        box = (left, top, left + side, top + side)
        across, down = label.labels.shape[1] / photo.width, label.labels.shape[0] / photo.height
        tokens = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)

        def cut(picture: Image.Image, window: tuple[float, float, float, float], how: Image.Resampling) -> Any:
            return np.asarray(picture.resize((size, size), how, box=window))

        image = cut(photo, box, Image.Resampling.BICUBIC)
        shifted = Image.fromarray((label.labels - UNCERTAIN).astype(np.uint8))
        labels = cut(shifted, tokens, Image.Resampling.NEAREST).astype(np.int8) + UNCERTAIN
        scores = cut(Image.fromarray(standard_scores(label.abdiv)), tokens, Image.Resampling.BILINEAR)
        labels, graded = snap(image, labels.astype(np.int8), scores)
        mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
        return image[:, mirror].copy(), labels[:, mirror].copy(), graded[:, mirror].copy()
