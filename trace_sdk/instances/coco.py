"""Masks in COCO's three spellings: polygons, run lengths, and run lengths compressed to text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as codec

# What `decode_mask` raises.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
_LONGEST = 7  # characters of a compressed run length: 34 bits and a sign

CATEGORY = {"id": 1, "name": "instance", "supercategory": "instance"}


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Mask of a COCO `segmentation`: a list of polygons, or {"size", "counts"} with counts as list or text.

    Returns:
        bool [H, W].

    Raises:
        UNREADABLE: it is none of them, or not of this size.
    """
    if not isinstance(segmentation, (list, dict)):
        raise ValueError(f"{segmentation!r:.40} is neither a list of polygons nor run lengths")
    if isinstance(segmentation, list):
        runs = codec.merge(codec.frPyObjects(_polygons(segmentation, height, width), height, width))
        return np.asarray(codec.decode([runs])[..., 0], np.bool_)
    return _expand_runs(segmentation, height, width)


def encode_runs(counts: Sequence[int], height: int, width: int) -> dict[str, Any]:
    """Run lengths of 0, 1, 0, … down the columns → COCO RLE with compressed counts as text."""
    # A last run of no pixel is valid, but pycocotools writes none.
    kept = list(counts[:-1] if counts[-1] == 0 else counts)
    runs = codec.frPyObjects({"size": [height, width], "counts": kept}, height, width)
    return {"size": [height, width], "counts": runs["counts"].decode("ascii")}


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """bool [H, W] → COCO RLE with compressed counts as text."""
    runs = codec.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}


def as_result(
    image_id: int | str, category_id: Any, rle: dict[str, Any], score: float, *, crowd: bool = False
) -> dict[str, Any]:
    """One COCO result: image_id, category_id, segmentation (RLE), bbox as x, y, width, height, area, score."""
    return {
        "image_id": image_id,
        "category_id": CATEGORY["id"] if category_id is None else category_id,
        "segmentation": rle,
        "bbox": codec.toBbox(rle).tolist(),
        "area": int(codec.area(rle)),
        "score": round(float(score), 6),
        **({"iscrowd": 1} if crowd else {}),
    }


def _polygons(shape: list[Any], height: int, width: int) -> list[list[float]]:
    if not shape:
        raise ValueError("it is empty")
    polygons = [[float(value) for value in polygon] for polygon in shape]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon needs at least three x, y pairs")
    # The decoder allocates by coordinates, so wild ones must not reach it.
    far = 2 * max(height, width)
    if not all(math.isfinite(value) and abs(value) <= far for polygon in polygons for value in polygon):
        raise ValueError("a polygon lies far outside the image")
    return polygons


def _expand_runs(shape: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Mask of run lengths of 0, 1, 0, … down the columns.

    Done here because pycocotools (2.0.11) writes past its buffers when the runs of a file are malformed.
    """
    if [int(side) for side in shape["size"]] != [height, width]:
        raise ValueError(f"its size is {shape['size']}, the image's is {[height, width]}")
    counts = shape["counts"]
    runs = _decompress(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError("its run lengths do not add up to the image")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """Run lengths from COCO's compressed form: 5 bits a character, from the fourth on less the last but one.

    A character has its bits above "0"; 32 says that the number goes on, 16 in its last character that it is negative.
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return []
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if ((codes < 0) | (codes >= 64)).any() or (ends - starts >= _LONGEST).any():
        raise ValueError("its compressed run lengths are damaged")
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("its compressed run lengths are cut off")
    lengths = ends + 1 - starts
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << 5 * lengths, 0)
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    runs: list[int] = values.tolist()
    return runs
