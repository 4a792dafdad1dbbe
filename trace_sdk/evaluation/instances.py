"""Class-agnostic quality of instance masks: AP, AP50, AP75 and AR100 by COCO's own evaluation (pycocotools)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trace_sdk.errors import DatasetError

MAX_MASKS = 100  # of each image, by score, as COCO counts


@dataclass(frozen=True)
class MaskScores:
    """In [0, 1]. ap: mean over IoU thresholds .50, .55 … .95. ap50, ap75: at one. ar100: recall, mean over the same
    thresholds, with at most 100 masks an image. images, instances, masks: how many were compared."""

    ap: float
    ap50: float
    ap75: float
    ar100: float
    images: int
    instances: int
    masks: int


def score_masks(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> MaskScores:
    """Compare masks with ground truth; categories are ignored.

    Args:
        truth: a COCO data set: images, annotations with segmentation, area, bbox and iscrowd.
        results: COCO results of those images: image_id, segmentation (RLE), score; possibly none.

    Raises:
        DatasetError: a result names an image that the truth has not, or the truth has no image or annotation.
    """
    known = {image["id"] for image in truth["images"]}
    if not known or not truth["annotations"]:
        raise DatasetError("The ground truth has no image or no annotation. Check the file.")
    if foreign := {result["image_id"] for result in results} - known:
        raise DatasetError(f"Results name image {min(foreign)}, which the ground truth has not. Give both of one set.")
    counted = sum(not annotation.get("iscrowd", 0) for annotation in truth["annotations"])
    if not results:
        return MaskScores(0.0, 0.0, 0.0, 0.0, len(known), counted, 0)
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {"info": {}, "categories": [{"id": 1, "name": "instance"}], **_one_category(truth)}
        reference.createIndex()
        found = reference.loadRes([{**result, "category_id": 1} for result in results])
        evaluation = COCOeval(reference, found, "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [1, 10, MAX_MASKS]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]  # [IoU, recall]; all areas
    recall = evaluation.eval["recall"][:, 0, 0, -1]
    at = dict(zip(np.round(evaluation.params.iouThrs, 2).tolist(), precision.mean(axis=1).tolist(), strict=True))
    return MaskScores(
        float(precision.mean()), at[0.5], at[0.75], float(recall.mean()), len(known), counted, len(results)
    )


def _one_category(truth: Mapping[str, Any]) -> dict[str, Any]:
    # createIndex and loadRes write into their entries, so they get copies.
    annotations = [{"iscrowd": 0, **annotation, "category_id": 1} for annotation in truth["annotations"]]
    return {"images": [dict(image) for image in truth["images"]], "annotations": annotations}
