"""Photos with their ternary labels, as training crops: a function of (seed, step) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trace_sdk.errors import DatasetError
from trace_sdk.pretraining.training_images import list_photos, open_photo
from trace_sdk.teacher.labeller import label_file
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.pseudo_labels import UNCERTAIN


class LabelledImages:
    """The photos below `photos` that have a label file below `labels`.

    Raises:
        DatasetError: no photo has a label.
    """

    def __init__(self, photos: Path, labels: Path, seed: int) -> None:
        self.pairs = [
            (photo, file) for photo in list_photos([photos]) if (file := label_file(photo, photos, labels)).is_file()
        ]
        if not self.pairs:
            raise DatasetError(
                f"No photo below {photos} has a label below {labels}. Run `trace-sdk label {photos} -o {labels}`."
            )
        self._seed = seed

    def batch(self, step: int, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Crops of side `size`, mirrored half of the time.

        Returns:
            images float [count, 3, size, size] in [−1, 1] and labels int8 [count, size, size].
        """
        rng = np.random.default_rng([self._seed, step])
        crops = [self._crop(rng, size) for _ in range(count)]
        images = torch.from_numpy(np.stack([image for image, _ in crops])).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, torch.from_numpy(np.stack([labels for _, labels in crops]))

    def _crop(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        photo_file, label = self.pairs[rng.integers(len(self.pairs))]
        photo = open_photo(photo_file)
        short = min(photo.size)
        side = min(short, round(short * rng.uniform(0.7, 1.0)))
        left, top = rng.integers(0, photo.width - side + 1), rng.integers(0, photo.height - side + 1)
        box = (float(left), float(top), float(left + side), float(top + side))
        image = np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box=box))
        labels = load_label(label).labels
        across, down = labels.shape[1] / photo.width, labels.shape[0] / photo.height
        on_grid = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        cut = Image.fromarray(labels.astype(np.int16) - UNCERTAIN).resize(
            (size, size), Image.Resampling.NEAREST, box=on_grid
        )
        ternary = (np.asarray(cut) + UNCERTAIN).astype(np.int8)
        if rng.random() < 0.5:
            image, ternary = image[:, ::-1], ternary[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(ternary)
