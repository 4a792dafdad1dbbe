"""A mask kept as its bounding box and what lies in it: pictures are large, most things in them small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

Box = tuple[slice, slice]  # rows, columns


@dataclass(frozen=True, eq=False)
class BoxedMask:
    """A mask of a picture.

    Attributes:
        box: its bounding box; empty for an empty mask.
        inside: bool, as large as the box.
    """

    box: Box
    inside: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: NDArray[np.bool_], corner: tuple[int, int] = (0, 0)) -> BoxedMask:
        """From a part of the picture, bool [h, w], whose first pixel is at `corner`: row, column."""
        rows, columns = box_of(mask, 0)
        return cls(shifted((rows, columns), *corner), mask[rows, columns])

    @cached_property
    def area(self) -> int:
        """Pixels."""
        return int(np.count_nonzero(self.inside))

    def within(self, box: Box) -> NDArray[np.bool_]:
        """What of it lies in another box, bool, as large as that."""
        part = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), np.bool_)
        own = overlap(self.box, box)
        part[seen_from(box, own)] = self.inside[seen_from(self.box, own)]
        return part

    def rle(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """COCO RLE with counts as bytes, in a picture of `shape`: height, width."""
        height, width = shape
        rows, columns = self.box
        # Down the columns, each with a pixel more that is outside, so that no run goes over to the next.
        tall, wide = self.inside.shape
        flat = np.zeros(1 + wide * (tall + 1), np.bool_)
        flat[1:].reshape(wide, tall + 1)[:, :-1] = self.inside.T
        column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), tall + 1)
        bounds = (columns.start + column) * height + rows.start + row
        # In a box of full height runs do go over.
        between = bounds[1:-1].reshape(-1, 2)
        bounds = np.concatenate([bounds[:1], between[between[:, 0] < between[:, 1]].ravel(), bounds[-1:]])
        counts = np.diff(bounds, prepend=0, append=height * width).tolist()
        if counts[-1] == 0:
            counts.pop()
        runs: dict[str, Any] = codec.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return runs


def box_of(mask: NDArray[np.bool_], around: int = 1) -> Box:
    """Bounding box with `around` more pixels, where there are some; empty for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    tight = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return widened(tight, around, mask.shape)


def widened(box: Box, around: int, shape: tuple[int, ...]) -> Box:
    """A box with `around` more pixels to each side, where the picture has some."""
    rows, columns = (
        slice(max(0, side.start - around), min(end, side.stop + around)) for side, end in zip(box, shape, strict=True)
    )
    return rows, columns


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all."""
    rows, columns = (
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in (0, 1)
    )
    return rows, columns


def overlap(one: Box, other: Box) -> Box:
    """What two boxes have in common; a side may be empty."""
    rows, columns = (
        slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
        for a, b in zip(one, other, strict=True)
    )
    return rows, columns


def shifted(box: Box, down: int, right: int) -> Box:
    """A box moved by some pixels."""
    rows, columns = box
    return slice(rows.start + down, rows.stop + down), slice(columns.start + right, columns.stop + right)


def seen_from(origin: Box, box: Box) -> Box:
    """A box in the coordinates of another one."""
    return shifted(box, -origin[0].start, -origin[1].start)
