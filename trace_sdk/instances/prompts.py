"""Points and boxes for promptable segmenters (SAM, SAM 2), from the instances that edges give (paper section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects

from trace_sdk.instances.result import Instances


@dataclass(frozen=True, eq=False, repr=False)
class SamPrompts:
    """One box and P points for each of K instances, best score first.

    Attributes:
        points: float32 [K, P, 2], x and y in pixels of the input, inside the instance: the centre of the largest disc
            in it, then of the largest disc clear of the earlier points. An instance with less room repeats its last.
        boxes: float32 [K, 4], left, top, right, bottom; right and bottom are outside.
        scores: float32 [K] in [0, 1], of the instances.
        size: width and height of the picture.
        info: as `Instances.info`.
    """

    points: NDArray[np.float32]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    size: tuple[int, int]
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        width, height = self.size
        return f"SamPrompts({len(self)} boxes with {self.points.shape[1]} points each in {width}x{height})"

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 [K, P]: 1, the point is inside."""
        return np.ones(self.points.shape[:2], np.int32)

    def to_sam(self) -> list[dict[str, Any]]:
        """For `segment_anything.SamPredictor.predict(**prompt)`, one instance at a time.

        point_coords float32 [P, 2], point_labels int32 [P], box float32 [4], multimask_output False.
        """
        return [
            {"point_coords": points, "point_labels": labels, "box": box, "multimask_output": False}
            for points, labels, box in zip(self.points, self.labels, self.boxes, strict=True)
        ]

    def to_sam2(self) -> dict[str, Any]:
        """For `sam2.sam2_image_predictor.SAM2ImagePredictor.predict(**prompts)`, all instances at once.

        point_coords float32 [K, P, 2], point_labels int32 [K, P], box float32 [K, 4], multimask_output False.
        """
        return {
            "point_coords": self.points,
            "point_labels": self.labels,
            "box": self.boxes,
            "multimask_output": False,
        }

    def to_ultralytics(self) -> dict[str, Any]:
        """For `ultralytics.SAM("sam2.1_b.pt")(image, **prompts)`.

        Lists bboxes [K][4], points [K][P][2], labels [K][P].
        """
        return {"bboxes": self.boxes.tolist(), "points": self.points.tolist(), "labels": self.labels.tolist()}

    def to_transformers(self) -> dict[str, Any]:
        """For `transformers.SamProcessor` or `Sam2Processor`: `processor(image, **prompts)`, one image.

        Lists input_points [1][K][P][2], input_labels [1][K][P], input_boxes [1][K][4].
        """
        return {
            "input_points": [self.points.tolist()],
            "input_labels": [self.labels.tolist()],
            "input_boxes": [self.boxes.tolist()],
        }


def make_prompts(found: Instances, points: int, min_score: float) -> SamPrompts:
    """Prompts of the instances that score `min_score` or more; see `EdgeMap.sam_prompts`."""
    kept = np.argsort(-found.scores, kind="stable")
    kept = kept[found.scores[kept] >= min_score]
    boxes = find_objects(found.labels)
    places = np.zeros((len(kept), points, 2), np.float32)
    for place, index in zip(places, kept, strict=True):
        rows, columns = boxes[index]
        corner = np.array([columns.start, rows.start], np.float32)
        place[:] = inner_points(found.labels[rows, columns] == index + 1, points) + corner
    height, width = found.labels.shape
    return SamPrompts(places, found.boxes[kept], found.scores[kept], (width, height), dict(found.info))


def inner_points(mask: NDArray[np.bool_], count: int) -> NDArray[np.float32]:
    """Centres of discs that fill a mask, largest first: float32 [count, 2], x and y of pixel centres."""
    framed = np.pad(mask, 1)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        room = distance_transform_edt(framed)
        if not room.any():
            found.append(found[-1])
            continue
        y, x = np.unravel_index(int(np.argmax(room)), room.shape)
        found.append((int(x) - 1, int(y) - 1))
        rows, columns = np.ogrid[: framed.shape[0], : framed.shape[1]]
        framed &= (rows - y) ** 2 + (columns - x) ** 2 >= room[y, x] ** 2
    return np.array(found, np.float32) + np.float32(0.5)
