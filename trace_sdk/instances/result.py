"""The instances of one picture, and the forms in which other tools take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from skimage.measure import approximate_polygon, find_contours

from trace_sdk import __version__
from trace_sdk.errors import ArgumentError, MissingExtraError
from trace_sdk.images import ImageInput, read_image
from trace_sdk.instances.coco import CATEGORY, encode_runs
from trace_sdk.instances.painting import paint_instances
from trace_sdk.pictures import png_bytes

if TYPE_CHECKING:
    from supervision import Detections

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
        return paint_instances(photo, self.labels, len(self), hatch=hatch)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.plot())

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Instances({len(self)} in {width}x{height}, threshold={self.info.get('threshold')})"


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
