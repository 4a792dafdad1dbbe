"""Semantic labels and edges → panoptic segments (paper section 3.5: tag-supervised semantics made panoptic).

Semantics say what, edges say where one ends. Each connected component of a thing class is split as masks are
(`propagation`, steps 1 and 2); pixels in regions that don't count go to the nearest instance of their component, so
labels are never changed and every pixel keeps its class. Stuff of one class is one segment. A thing component under
`min_area`, and what is void in the labels, is void (0). Nothing is marked as crowd: a detector has no groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, label

from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.hierarchy import Hierarchy, enlarge
from trace_sdk.instances.label_sets import LabelSet
from trace_sdk.instances.painting import borders, colour
from trace_sdk.instances.splitting import split_masks
from trace_sdk.instances.walk import Regions
from trace_sdk.pictures import png_bytes

FILL = 0.55  # opacity of the colours over the picture


@dataclass(frozen=True, eq=False, repr=False)
class Panoptic:
    """Segments of one picture.

    Attributes:
        ids: int32 [H, W], segment of each pixel, 1 … K; 0 is void. Read-only.
        segments: of each id, in order: id, category_id, isthing, area, bbox as x, y, width, height, iscrowd 0.
        labels: what the categories are.
        rgb: uint8 [H, W, 3], the photo.
        info: threshold, min_area, and the edge map's provenance.
    """

    ids: NDArray[np.int32]
    segments: list[dict[str, Any]]
    labels: LabelSet
    rgb: NDArray[np.uint8]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids.flags.writeable = False

    def __len__(self) -> int:
        return len(self.segments)

    def to_png(self) -> PIL.Image.Image:
        """COCO's picture of segments: id = red + 256 · green + 65536 · blue."""
        return PIL.Image.fromarray(np.stack([self.ids & 255, self.ids >> 8 & 255, self.ids >> 16], 2).astype(np.uint8))

    def to_coco(self, image_id: int | str, file_name: str) -> dict[str, Any]:
        """An entry of COCO panoptic `annotations`; `file_name` is that of the PNG."""
        kept = ("id", "category_id", "area", "bbox", "iscrowd")
        segments = [{key: segment[key] for key in kept} for segment in self.segments]
        return {"image_id": image_id, "file_name": file_name, "segments_info": segments}

    def plot(self) -> PIL.Image.Image:
        """Each segment in a colour of its own over the photo, stuff darker, void as it is; RGB, W × H."""
        colours = np.zeros((len(self) + 1, 3))
        for number, segment in enumerate(self.segments, start=1):
            value = 1.0 if segment["isthing"] else 0.55
            colours[number] = colour(number, value)
        painted = np.rint(colours * 255)[self.ids]
        opacity = np.where(self.ids > 0, FILL, 0.0)[..., None]
        mixed = self.rgb + opacity * (painted - self.rgb)
        mixed[borders(self.ids)] = 255
        return PIL.Image.fromarray(np.rint(mixed).astype(np.uint8))

    def _repr_png_(self) -> bytes:
        return png_bytes(self.plot())

    def __repr__(self) -> str:
        height, width = self.ids.shape
        things = sum(segment["isthing"] for segment in self.segments)
        return f"Panoptic({things} things, {len(self) - things} stuff in {width}x{height}, labels={self.labels.name!r})"


def read_semantic(file: str | Path, labels: LabelSet) -> NDArray[np.int64]:
    """Values of a semantic PNG: grey or palette as they are, colours by the label set's palette; int64 [H, W].

    Raises:
        DatasetError: unreadable, colours that the palette has not, or a value that the label set has not.
    """
    path = Path(file)
    try:
        with PIL.Image.open(path) as picture:
            opaque = {"RGBA": "RGB", "LA": "L"}.get(picture.mode)
            values = np.asarray(picture.convert(opaque) if opaque else picture)
    # Pillow's decoders raise errors of many kinds on damaged files.
    except Exception as error:
        raise DatasetError(f"{path} cannot be read ({type(error).__name__}). Put the whole file there.") from error
    if values.ndim == 3:
        values = _by_palette(values, labels, path)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise DatasetError(
            f"{path} holds {values.dtype} {list(values.shape)}, not one label a pixel. Write it as grey."
        )
    whole = values.astype(np.int64)
    if unknown := sorted(set(np.unique(whole).tolist()) - labels.values.keys() - labels.void):
        raise DatasetError(
            f"{path} has value {unknown[0]}, which {labels.name} has not. Give the label set that it was made with."
        )
    return whole


def split_things(
    probability: NDArray[np.float32],
    hierarchy: Hierarchy,
    threshold: float,
    min_area: int,
    semantic: NDArray[np.integer[Any]],
    labels: LabelSet,
) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Segment ids, int32 [H, W], and their `Panoptic.segments`; see the module's head for how."""
    of_piece, _ = hierarchy.cut(threshold, min_area)
    regions = Regions(enlarge(of_piece[hierarchy.pieces], probability.shape, hierarchy.step))
    ids = np.zeros(semantic.shape, np.int32)
    owners: list[tuple[int, bool]] = []
    for value in np.unique(semantic):
        category = labels.values.get(int(value))
        if category is None:
            continue
        inside = semantic == value
        if not category.thing:
            owners.append((category.id, False))
            ids[inside] = len(owners)
            continue
        parts, _ = label(inside)
        for number, box in enumerate(find_objects(parts), start=1):
            part = parts[box] == number
            if np.count_nonzero(part) < min_area:
                continue
            fragments = split_masks(probability, regions, [BoxedMask(box, part)])
            instance_of = np.full(len(regions.areas), -1, np.int32)
            for fragment in fragments:
                instance_of[fragment.region] = fragment.instance
            seeds = np.where(part, instance_of[regions.labels[box]], -1)
            if (seeds < 0).all():
                seeds[part] = 0
            y, x = distance_transform_edt(seeds < 0, return_distances=False, return_indices=True)
            nearest = seeds[y, x]
            ids[box][part] = nearest[part] + len(owners) + 1
            owners += [(category.id, True)] * (int(seeds.max()) + 1)
    return ids, _described(ids, owners)


def _described(ids: NDArray[np.int32], owners: Sequence[tuple[int, bool]]) -> list[dict[str, Any]]:
    areas = np.bincount(ids.ravel(), minlength=len(owners) + 1)
    described = []
    for number, (box, (category, thing)) in enumerate(zip(find_objects(ids), owners, strict=True), start=1):
        rows, columns = box
        described.append(
            {
                "id": number,
                "category_id": category,
                "isthing": int(thing),
                "area": int(areas[number]),
                "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                "iscrowd": 0,
            }
        )
    return described


def segment_values(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """COCO's picture of segments, uint8 [H, W, 3] → ids, int64 [H, W]."""
    red, green, blue = np.moveaxis(ids.astype(np.int64), -1, 0)
    values: NDArray[np.int64] = red + 256 * green + 65536 * blue
    return values


def check_semantic(semantic: NDArray[Any], shape: tuple[int, ...], labels: LabelSet) -> NDArray[np.int64]:
    """Raises ArgumentError unless `semantic` is integer [H, W] of the picture's size with known values."""
    given = np.asarray(semantic)
    if given.shape != shape or given.dtype.kind not in "bui":
        raise ArgumentError(
            f"semantic is {given.dtype} {list(given.shape)}; expected integers {list(shape)}, as large as the picture."
        )
    if unknown := sorted(set(np.unique(given).tolist()) - labels.values.keys() - labels.void):
        raise ArgumentError(f"semantic has value {unknown[0]}, which {labels.name} has not. Give its own label set.")
    return given.astype(np.int64)


def panoptic_content(
    images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], labels: LabelSet, info: Any
) -> dict[str, Any]:
    """A COCO panoptic data set."""
    categories = {category.id: category for category in labels.values.values()}
    return {
        "info": info,
        "images": list(images),
        "annotations": list(annotations),
        "categories": [categories[i].to_coco() for i in sorted(categories)],
    }


def _by_palette(rgb: NDArray[np.uint8], labels: LabelSet, path: Path) -> NDArray[np.int64]:
    if labels.palette is None:
        raise DatasetError(f"{path} is in colour, and {labels.name} has no palette. Write its labels as grey values.")
    codes = segment_values(labels.palette)
    order = np.argsort(codes)
    place = np.minimum(np.searchsorted(codes[order], wanted := segment_values(rgb)), len(codes) - 1)
    found = order[place]
    if (wrong := codes[found] != wanted).any():
        colour = rgb[wrong][0].tolist()
        raise DatasetError(
            f"{path} has colour {colour}, which the palette of {labels.name} has not. Write it without smoothing."
        )
    return found
