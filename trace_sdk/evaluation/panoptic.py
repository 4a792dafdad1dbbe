"""Panoptic quality (Kirillov et al., CVPR 2019) of COCO panoptic data sets: PQ, SQ and RQ, things and stuff apart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.instances.panoptic import segment_values

VOID = 0
MATCH = 0.5  # IoU above which two segments are one; so no segment can match twice


@dataclass
class SegmentCounts:
    """Of one category: matches, their IoUs added up, segments found that are none, segments missed."""

    matched: int = 0
    iou: float = 0.0
    false: int = 0
    missed: int = 0


@dataclass(frozen=True)
class Quality:
    """In [0, 1], means over the categories that occur: pq = sq · rq in each category. categories: how many."""

    pq: float
    sq: float
    rq: float
    categories: int


@dataclass(frozen=True)
class PanopticScores:
    """Quality of all categories, of things and of stuff; None where none occurs."""

    all: Quality
    things: Quality | None
    stuff: Quality | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Segmented:
    """ids: integer [H, W], 0 is void. categories: of each id. crowds: ids of groups that nobody told apart."""

    ids: NDArray[np.integer[Any]]
    categories: Mapping[int, int]
    crowds: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class PanopticSet:
    """A COCO panoptic data set: panoptic.json, and its PNGs in panoptic/ beside it.

    images: of the file, by id. things: of each category, whether it has instances. read: image id → segments.
    """

    file: Path
    images: dict[Any, dict[str, Any]]
    things: dict[int, bool]
    read: Callable[[Any], Segmented]


def count_segments(truth: Segmented, found: Segmented, into: dict[int, SegmentCounts]) -> None:
    """Add one image to the counts of each category.

    Segments of one category match where their IoU is above 0.5, pixels that are void in the truth left out. A crowd is
    neither matched nor missed; a segment of which more than half lies in void or in crowds of its category is not
    false.

    Raises:
        ArgumentError: the two have different sizes, or an id has no category.
    """
    if truth.ids.shape != found.ids.shape:
        raise ArgumentError(f"Segments are {list(found.ids.shape)}, the truth is {list(truth.ids.shape)}.")
    base = int(found.ids.max()) + 1
    codes, areas = np.unique(truth.ids.astype(np.int64) * base + found.ids, return_counts=True)
    common = {divmod(int(code), base): int(area) for code, area in zip(codes, areas, strict=True)}
    size_true: defaultdict[int, int] = defaultdict(int)
    size_found: defaultdict[int, int] = defaultdict(int)
    for (a, b), area in common.items():
        size_true[a] += area
        size_found[b] += area
    for sizes, segments in ((size_true, truth), (size_found, found)):
        if unknown := sizes.keys() - segments.categories.keys() - {VOID}:
            raise ArgumentError(f"Segment {min(unknown)} has no category. List every id of the picture.")

    told, taken = set(), set()
    for (a, b), area in common.items():
        if VOID in (a, b) or a in truth.crowds or truth.categories[a] != found.categories[b]:
            continue
        iou = area / (size_true[a] + size_found[b] - area - common.get((VOID, b), 0))
        if iou > MATCH:
            counts = into.setdefault(truth.categories[a], SegmentCounts())
            counts.matched += 1
            counts.iou += iou
            told.add(a)
            taken.add(b)
    for a in size_true.keys() - told - truth.crowds - {VOID}:
        into.setdefault(truth.categories[a], SegmentCounts()).missed += 1
    for b in size_found.keys() - taken - {VOID}:
        category = found.categories[b]
        excused = common.get((VOID, b), 0)
        excused += sum(common.get((a, b), 0) for a in truth.crowds if truth.categories.get(a) == category)
        if 2 * excused <= size_found[b]:
            into.setdefault(category, SegmentCounts()).false += 1


def score_segments(counts: Mapping[int, SegmentCounts], things: Mapping[int, bool], images: int) -> PanopticScores:
    """Means over categories. Raises DatasetError where nothing was counted."""
    if not counts:
        raise DatasetError("There is no segment to compare. Check the files.")
    everything = _mean(list(counts.values()))
    assert everything is not None
    return PanopticScores(
        everything,
        _mean([count for category, count in counts.items() if things.get(category, False)]),
        _mean([count for category, count in counts.items() if not things.get(category, False)]),
        images,
    )


def score_panoptic(
    truth: PanopticSet, found: PanopticSet, on_image: Callable[[str], None] = lambda name: None
) -> PanopticScores:
    """Panoptic quality of one data set against another of the same image ids.

    Raises:
        DatasetError: an image is missing in `found`, of another size, or a file is malformed.
    """
    if missing := [number for number in truth.images if number not in found.images]:
        raise DatasetError(f"{found.file} lacks image {missing[0]} of {truth.file}. Make segments of every image.")
    counts: dict[int, SegmentCounts] = {}
    for number, image in truth.images.items():
        try:
            count_segments(truth.read(number), found.read(number), counts)
        except ArgumentError as error:
            raise DatasetError(f"{found.file}: image {number}: {error}") from error
        on_image(str(image.get("file_name", number)))
    return score_segments(counts, truth.things, len(truth.images))


def open_panoptic(path: str | Path) -> PanopticSet:
    """FOLDER/panoptic.json with FOLDER/panoptic/*.png, or any other FILE.json with FILE/*.png beside it (as COCO).

    Raises:
        DatasetError: missing or malformed.
    """
    file = Path(path) / "panoptic.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        things = {int(category["id"]): bool(category["isthing"]) for category in content["categories"]}
        entries = {entry["image_id"]: entry for entry in content["annotations"]}
        pictures = {number: file.with_suffix("") / str(entry["file_name"]) for number, entry in entries.items()}
    except OSError as error:
        raise DatasetError(f"{file}: {error.strerror}. Give a COCO panoptic data set.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is not a COCO panoptic file ({type(error).__name__}: {error}).") from error
    if not images or images.keys() - entries.keys():
        raise DatasetError(f"{file} lists no image, or one without annotation. Write it again.")

    def read(number: Any) -> Segmented:
        return _segmented(file, entries[number], pictures[number])

    return PanopticSet(file, images, things, read)


def _segmented(file: Path, entry: Mapping[str, Any], picture: Path) -> Segmented:
    try:
        with Image.open(picture) as image:
            ids = segment_values(np.asarray(image.convert("RGB")))
    # Pillow's decoders raise errors of many kinds on damaged files.
    except Exception as error:
        raise DatasetError(f"{picture} cannot be read ({type(error).__name__}). Put the whole file there.") from error
    try:
        segments = entry["segments_info"]
        categories = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
        crowds = frozenset(int(segment["id"]) for segment in segments if segment.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{file}: segments of {picture.name} are malformed ({reason}).") from error
    if unknown := set(np.unique(ids).tolist()) - categories.keys() - {VOID}:
        raise DatasetError(f"{picture} has segment {min(unknown)}, which {file} does not list. Write both alike.")
    return Segmented(ids, categories, crowds)


def _mean(counts: Sequence[SegmentCounts]) -> Quality | None:
    # A category of which only excused segments were seen has no figure.
    seen = [one for one in counts if one.matched + one.false + one.missed]
    if not seen:
        return None
    sq = [one.iou / one.matched if one.matched else 0.0 for one in seen]
    rq = [one.matched / (one.matched + one.false / 2 + one.missed / 2) for one in seen]
    pq = [a * b for a, b in zip(sq, rq, strict=True)]
    return Quality(float(np.mean(pq)), float(np.mean(sq)), float(np.mean(rq)), len(seen))
