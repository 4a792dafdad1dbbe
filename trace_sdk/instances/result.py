"""The instances of one picture, and the forms in which other tools take them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import find_objects, maximum_filter
from skimage.measure import approximate_polygon, find_contours

from trace_sdk import __version__
from trace_sdk.errors import ArgumentError, MissingExtraError
from trace_sdk.images import ImageInput, read_image
from trace_sdk.instances.coco import CATEGORY, encode_runs
from trace_sdk.pictures import png_bytes

if TYPE_CHECKING:
    from supervision import Detections

FILL = 0.5  # opacity of the colours over the picture
PEN = 800  # longest side, in pixels, for each further pixel of the pen
_TOLERANCE = 0.5  # how far a polygon may leave the outline, pixels
_LABELME = "5.5.0"  # version of labelme's format


@dataclass(frozen=True, eq=False, repr=False)
class Instances:
    """A picture cut into instances: every pixel belongs to one, the largest is 1.

    Edges say where one thing ends, not what it is: sky, road and wall are instances here as well.

    Attributes:
        labels: int32 [H, W] at the size of the input, 1 … K, read-only.
        scores: float32 [K] in [0, 1]: mean edge probability along the outline, less the strongest border that was
            removed inside. 1: a clean outline and nothing inside. 0: specks, or all of the picture.
        rgb: uint8 [H, W, 3], the input, read-only.
        info: threshold, min_area, source, and the edge map's provenance.
    """

    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    rgb: NDArray[np.uint8]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels.flags.writeable = False
        self.scores.flags.writeable = False

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """bool [K, H, W]; made at each call, K · H · W bytes. `labels == k` is one of them."""
        masks: NDArray[np.bool_] = self.labels == np.arange(1, len(self) + 1, dtype=np.int32)[:, None, None]
        return masks

    @cached_property
    def areas(self) -> NDArray[np.int64]:
        """Pixels of each instance, int64 [K]."""
        return np.bincount(self.labels.ravel(), minlength=len(self) + 1)[1:]

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """Left, top, right, bottom of each instance, float32 [K, 4], in pixels; right and bottom are outside."""
        corners = [(box[1].start, box[0].start, box[1].stop, box[0].stop) for box in find_objects(self.labels)]
        return np.array(corners, np.float32).reshape(-1, 4)

    @cached_property
    def polygons(self) -> list[list[NDArray[np.float64]]]:
        """Outlines of each instance: rings float64 [N, 2] of x, y, where pixel (0, 0) covers [0, 1] × [0, 1].

        Within half a pixel of the outline. Holes are not kept, as COCO polygons have none; `rle` is exact.
        """
        return [_rings(self.labels[box] == number, box) for number, box in enumerate(find_objects(self.labels), 1)]

    @cached_property
    def rle(self) -> list[dict[str, Any]]:
        """Each mask as COCO RLE: {"size": [H, W], "counts": compressed text}."""
        height, width = self.labels.shape
        flat = self.labels.T.ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=0))  # labels start at 1, so pixel 0 is a start
        ends = np.append(starts[1:], flat.size)
        order = np.argsort(flat[starts], kind="stable")
        # Of one instance's runs: skip to its start, take to its end, and the rest of the picture at last.
        bounds = np.stack([starts, ends], axis=1)[order]
        firsts = np.searchsorted(flat[starts][order], np.arange(1, len(self) + 2))
        return [
            encode_runs(np.diff(bounds[first:last].ravel(), prepend=0, append=flat.size).tolist(), height, width)
            for first, last in pairwise(firsts)
        ]

    def to_coco(self, image_id: int = 1, file_name: str | None = None, first_id: int = 1) -> dict[str, Any]:
        """A COCO data set of one image: info, images, categories, annotations with RLE, bbox, area and score.

        Args:
            image_id: of the image.
            file_name: of the image; None: the name of the file it was read from.
            first_id: of its first annotation.
        """
        height, width = self.labels.shape
        name = file_name if file_name is not None else Path(str(self.info.get("source", ""))).name
        boxes = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        annotations = [
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": CATEGORY["id"],
                "segmentation": rle,
                "bbox": boxes[i].tolist(),
                "area": int(self.areas[i]),
                "iscrowd": 0,
                "score": round(float(self.scores[i]), 6),
            }
            for i, rle in enumerate(self.rle)
        ]
        return {
            "info": coco_info(self.info),
            "images": [{"id": image_id, "file_name": name, "width": width, "height": height}],
            "categories": [CATEGORY],
            "annotations": annotations,
        }

    def to_supervision(self) -> Detections:
        """`supervision.Detections` with boxes, masks [K, H, W], scores as confidence, and class 0.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        try:
            from supervision import Detections
        except ModuleNotFoundError as error:
            raise MissingExtraError("to_supervision() needs supervision: pip install supervision") from error
        return Detections(
            xyxy=self.boxes, mask=self.masks, confidence=self.scores, class_id=np.zeros(len(self), np.int64)
        )

    def to_labelme(self) -> dict[str, Any]:
        """The content of a labelme file: one polygon a ring, rings of one instance share a group."""
        height, width = self.labels.shape
        shapes = [
            {
                "label": CATEGORY["name"],
                "points": ring[:-1].tolist(),
                "group_id": number if len(rings) > 1 else None,
                "shape_type": "polygon",
                "flags": {},
                "description": f"score {score:.3f}",
            }
            for number, (rings, score) in enumerate(zip(self.polygons, self.scores, strict=True), 1)
            for ring in rings
        ]
        return {
            "version": _LABELME,
            "flags": {},
            "shapes": shapes,
            "imagePath": str(self.info.get("source", "")),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }

    def plot(self, image: ImageInput | None = None, *, hatch: bool = False) -> PIL.Image.Image:
        """Each instance in its own colour over the input, or over another `image` of its size: RGB, W x H.

        `hatch` paints stripes, whose direction differs between neighbours in number, so that colour is not needed.

        Raises:
            ArgumentError: `image` has another size.
            ImageError: `image` cannot be read.
        """
        photo = self.rgb if image is None else read_image(image).rgb
        if photo.shape != (*self.labels.shape, 3):
            raise ArgumentError(
                f"The image is {photo.shape[1]}x{photo.shape[0]}, the instances are "
                f"{self.labels.shape[1]}x{self.labels.shape[0]}. Pass the image they were found in."
            )
        colours = PIL.Image.fromarray(_palette(len(self))[self.labels - 1])
        mixed = np.array(PIL.Image.blend(PIL.Image.fromarray(photo), colours, FILL))
        if hatch:
            bare = ~_stripes(self.labels)
            mixed[bare] = photo[bare]
        border = np.zeros(self.labels.shape, np.uint8)
        border[:, 1:] |= self.labels[:, 1:] != self.labels[:, :-1]
        border[1:] |= self.labels[1:] != self.labels[:-1]
        mixed[maximum_filter(border, round(max(border.shape) / PEN) + 1) > 0] = 255
        return PIL.Image.fromarray(mixed)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.plot())

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Instances({len(self)} in {width}x{height}, threshold={self.info.get('threshold')})"


def paint_masks(
    rgb: NDArray[np.uint8], masks: NDArray[np.bool_], numbers: Sequence[int] | None = None
) -> PIL.Image.Image:
    """Masks bool [K, H, W] in colours over a photo, uint8 [H, W, 3], small ones on top, with white outlines.

    A mask has the colour of its number, from 0; None: 0 … K − 1.
    """
    coloured = range(len(masks)) if numbers is None else numbers
    number = np.zeros(rgb.shape[:2], np.int32)
    border = np.zeros(rgb.shape[:2], np.uint8)
    by_size = np.argsort(-masks.sum(axis=(1, 2)), kind="stable")
    for index in by_size:
        mask = masks[index]
        number[mask] = coloured[index] + 1
        border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        border[1:] |= mask[1:] != mask[:-1]
    colours = np.concatenate([np.zeros((1, 3), np.uint8), _palette(max(coloured, default=-1) + 1)])[number]
    mixed = np.array(PIL.Image.blend(PIL.Image.fromarray(rgb), PIL.Image.fromarray(colours), FILL))
    mixed[number == 0] = rgb[number == 0] // 2
    mixed[maximum_filter(border, round(max(border.shape) / PEN) + 1) > 0] = 255
    return PIL.Image.fromarray(mixed)


def coco_info(info: dict[str, Any]) -> dict[str, Any]:
    """COCO's `info`: what made the file. Without a date, so that a job done again gives the same bytes."""
    kept = ("engine", "engine_sha256", "input_size", "network_size", "threshold", "min_area")
    return {
        "description": "Instances from edges, made by trace-sdk",
        "version": __version__,
        **{key: info[key] for key in kept if key in info},
    }


def _rings(mask: NDArray[np.bool_], box: tuple[slice, slice]) -> list[NDArray[np.float64]]:
    """Outer outlines of a cropped mask, x, y in the picture."""
    framed = np.pad(mask, 1).astype(np.float32)
    rings = []
    for ring in find_contours(framed, 0.5, fully_connected="low"):  # type: ignore[no-untyped-call]
        y, x = ring.T
        if np.dot(x[:-1], y[1:]) < np.dot(x[1:], y[:-1]):
            continue  # runs the other way round: a hole
        simple = approximate_polygon(ring, _TOLERANCE)  # type: ignore[no-untyped-call]
        if len(simple) < 4:
            simple = ring  # a speck, of which a line would be left
        # Contours go through pixel centres of a framed crop: half a pixel to corners, one back for the frame.
        rings.append(simple[:, ::-1] - 0.5 + (box[1].start, box[0].start))
    return rings


def _stripes(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the stripes of each instance lie: slanted, upright, slanted the other way, level, in turns by number."""
    pen = max(2, round(max(labels.shape) / PEN * 4))
    y, x = np.ogrid[: labels.shape[0], : labels.shape[1]]
    along = np.choose(labels % 4, np.broadcast_arrays(x + y, x + 0 * y, x - y, y + 0 * x))
    stripes: NDArray[np.bool_] = (along // pen) % 2 == 0
    return stripes


def _palette(count: int) -> NDArray[np.uint8]:
    """Distinct colours, uint8 [count, 3]: hues by the golden ratio, so that consecutive ones differ."""
    hues = (np.arange(count) * 0.618034) % 1
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues]).reshape(-1, 3)
    levels: NDArray[np.uint8] = np.rint(colours * 255).astype(np.uint8)
    return levels
