"""Class-agnostic quality of instance masks: AP, AP50, AP75 and AR100 by COCO's own evaluation (pycocotools)."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.datasets import annotated_mask, stored_size
from trace_sdk.instances.coco import encode_mask
from trace_sdk.instances.predictions import decode_entries, read_predictions

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

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, ready for JSON."""
        return asdict(self)


def score_file(folder: str | Path, file: str | Path, names: Collection[str] | None = None) -> MaskScores:
    """Compare a file of masks (see `trace_sdk.instances.predictions`) with FOLDER/instances.json.

    Args:
        folder: a COCO data set with images/.
        file: COCO results, or a data set, whose images are found by their file names; masks of images that are not
            looked at are passed over.
        names: stems of the photos to look at; None: all.

    Raises:
        DatasetError: a file is missing or malformed, or a mask or a photo is.
    """
    source = Path(folder) / "instances.json"
    predictions = read_predictions(
        Path(file), Path(folder) / "images", source, _refuse, class_agnostic=True, by_name=True
    )
    truth = json.loads(source.read_bytes())
    sizes = {
        image["id"]: (image["width"], image["height"])
        if {"width", "height"} <= image.keys()
        else stored_size(source.parent / "images" / str(image["file_name"]))
        for image in truth["images"]
        if names is None or Path(str(image["file_name"])).stem in names
    }
    results = []
    for image in predictions.images:
        if image.id not in sizes or not image.entries:
            continue
        width, height = stored_size(image.photo)
        for entry, mask in decode_entries(image, height, width, Path(file), _refuse):
            results.append(
                {"image_id": image.id, "segmentation": encode_mask(mask), "score": float(entry.get("score", 1.0))}
            )
    images = [{"id": number, "width": width, "height": height} for number, (width, height) in sizes.items()]
    return score_masks({"images": images, "annotations": _annotations(source, truth, sizes)}, results)


def _annotations(source: Path, truth: Mapping[str, Any], sizes: Mapping[Any, tuple[int, int]]) -> list[dict[str, Any]]:
    """Annotations of the images in `sizes`, with all that COCO's evaluation takes: tools leave out some of it."""
    listed = truth.get("annotations")
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "image_id" in one for one in listed):
        raise DatasetError(f"{source} has an annotation without image_id, or no list of them. Download it again.")
    found = []
    for one in listed:
        if one["image_id"] in sizes:
            width, height = sizes[one["image_id"]]
            rle = encode_mask(annotated_mask(one, height, width, source))
            kept = {"image_id": one["image_id"], "iscrowd": int(bool(one.get("iscrowd")))}
            found.append({**kept, "segmentation": rle, "bbox": codec.toBbox(rle).tolist(), "area": codec.area(rle)})
    return found


def _refuse(error: DatasetError) -> NoReturn:
    raise error


def score_masks(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> MaskScores:
    """Compare masks with ground truth; categories are ignored.

    Args:
        truth: a COCO data set: images with id, annotations with image_id, segmentation, area and bbox.
        results: COCO results of those images: image_id, segmentation (RLE), score; possibly none.

    Raises:
        DatasetError: a result names an image that the truth has not, or the truth has no image or annotation.
    """
    known = {image["id"] for image in truth["images"]}
    if not known or not truth["annotations"]:
        raise DatasetError("The ground truth has no image or no annotation. Check the file.")
    if foreign := {result["image_id"] for result in results} - known:
        raise DatasetError(
            f"Results name image {min(foreign, key=str)}, which the ground truth has not. Give both of one set."
        )
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
    # createIndex and loadRes write into their entries, so they get copies. What has id 0 counts as never found.
    annotations = [
        {"iscrowd": 0, **annotation, "category_id": 1, "id": number}
        for number, annotation in enumerate(truth["annotations"], start=1)
    ]
    return {"images": [dict(image) for image in truth["images"]], "annotations": annotations}
