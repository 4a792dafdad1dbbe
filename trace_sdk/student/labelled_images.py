"""Photos with their ternary labels, as training crops: a function of (seed, step) alone."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.images import read_image, upright_size
from trace_sdk.labelling.images import NamedImage, Where, find_images
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
            do = f"Run `trace-sdk label PHOTOS --backbone BACKBONE -o {labels}`."
            if other := next(labels.rglob("*.npz"), None):
                do = (
                    f"There is one of {other.relative_to(labels).with_suffix('')}, but none of {found[0].name}: "
                    "give the photos as `trace-sdk label` was given them."
                )
            raise DatasetError(f"None of {len(found)} photos has a label below {labels}. {do}")
        self._seed = seed
        self._sizes: dict[str, tuple[int, int]] = {}

    def split(self, share: float) -> tuple[LabelledImages, LabelledImages]:
        """The images to learn from and about `share` of them held out, by their names: more images move none.

        Raises:
            ArgumentError: one of the two would be empty.
        """
        held_out = [pair for pair in self.pairs if _place(pair[0].name) < share]
        learnt = [pair for pair in self.pairs if _place(pair[0].name) >= share]
        if not held_out or not learnt:
            raise ArgumentError(
                f"Holding out {share:g} of {len(self.pairs)} images leaves {len(learnt)} to learn from and "
                f"{len(held_out)} to score on; both need one. Give another share, or label more images."
            )
        return self._of(learnt), self._of(held_out)

    def _of(self, pairs: list[tuple[NamedImage, Path]]) -> LabelledImages:
        part = copy.copy(self)
        part.pairs = pairs
        return part

    def names_sha256(self) -> str:
        """Which images these are."""
        return hashlib.sha256("\n".join(image.name for image, _ in self.pairs).encode()).hexdigest()

    def batch(
        self, step: int, count: int, size: int, chosen: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crops of side `size`, mirrored half of the time.

        Args:
            chosen: which of the `count` crops to make, None for all; each is the same whichever others are made.

        Returns:
            images float [crops, 3, size, size] in [−1, 1], labels int8 [crops, size, size], and graded edges float
            [crops, size, size] in [0, 1]; both snapped, see `snapping`.
        """
        rng = np.random.default_rng([self._seed, step])
        drawn = [self._draw(rng) for _ in range(count)]
        cuts = [cut(*drawn[index], size) for index in (range(count) if chosen is None else chosen)]
        crops = [(image, *snap(image, label, scores)) for image, label, scores in cuts]
        images, labels, graded = zip(*crops, strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(graded))

    def _draw(self, rng: np.random.Generator) -> tuple[NamedImage, Path, tuple[int, int, int], bool]:
        """An image, its label file, a square (left, top, side) in it, and whether to mirror it."""
        image, file = self.pairs[rng.integers(len(self.pairs))]
        width, height = self.size(image)
        short = min(width, height)
        side = min(short, round(short * rng.uniform(0.5, 1.0)))
        left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        return image, file, (left, top, side), bool(rng.random() < 0.5)

    def size(self, image: NamedImage) -> tuple[int, int]:
        """(width, height) as the teacher saw it, from the file's head alone; remembered."""
        if image.name not in self._sizes:
            self._sizes[image.name] = upright_size(image.read(), image.name)
        return self._sizes[image.name]


def _place(name: str) -> float:
    """A number in [0, 1) for each name, spread evenly."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def cut(
    named: NamedImage, file: Path, square: tuple[int, int, int], mirrored: bool, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32]]:
    """A square (left, top, side) of an image, its ternary labels and its standard scores, all [size, size]."""
    # As the teacher saw it: upright by EXIF, alpha on white.
    photo, label = Image.fromarray(read_image(named.read(), named.name).rgb), load_label(file)
    left, top, side = square
    box = (left, top, left + side, top + side)
    across, down = label.labels.shape[1] / photo.width, label.labels.shape[0] / photo.height
    tokens = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)

    def scaled(picture: Image.Image, window: tuple[float, float, float, float], how: Image.Resampling) -> Any:
        return np.asarray(picture.resize((size, size), how, box=window))

    image = scaled(photo, box, Image.Resampling.BICUBIC)
    shifted = Image.fromarray((label.labels - UNCERTAIN).astype(np.uint8))
    labels = scaled(shifted, tokens, Image.Resampling.NEAREST).astype(np.int8) + UNCERTAIN
    scores = scaled(Image.fromarray(standard_scores(label.abdiv)), tokens, Image.Resampling.BILINEAR)
    mirror = slice(None, None, -1 if mirrored else 1)
    return image[:, mirror].copy(), labels.astype(np.int8)[:, mirror].copy(), scores[:, mirror].copy()
