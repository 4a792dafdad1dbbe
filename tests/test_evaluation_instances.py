from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.instances import score_file, score_masks
from trace_sdk.instances.coco import encode_mask


def strip(start: int, stop: int) -> Any:
    mask = np.zeros((20, 100), np.bool_)
    mask[:, start:stop] = True
    return mask


def truth(*masks: Any, **changes: Any) -> dict[str, Any]:
    annotations = [
        {"id": i, "image_id": 1, "category_id": 5 + i, "segmentation": encode_mask(mask), "area": int(mask.sum()),
         "bbox": [0, 0, 1, 1], "iscrowd": 0, **changes}
        for i, mask in enumerate(masks, 1)
    ]  # fmt: skip
    return {"images": [{"id": 1, "width": 100, "height": 20}], "annotations": annotations}


def results(*masks: tuple[Any, float]) -> list[dict[str, Any]]:
    return [{"image_id": 1, "segmentation": encode_mask(mask), "score": score} for mask, score in masks]


A, B = strip(0, 40), strip(50, 90)


@pytest.mark.parametrize(
    ("found", "ap", "ap50", "ap75", "ar100"),
    [
        ([(A, 0.9), (B, 0.8)], 1, 1, 1, 1),
        # Half of the recall at full precision: 51 of 101 points of recall.
        ([(A, 0.9)], 51 / 101, 51 / 101, 51 / 101, 0.5),
        # IoU 32 / 40 = .8 counts at .50 … .80, seven of ten thresholds.
        ([(strip(0, 32), 0.9), (strip(50, 82), 0.8)], 0.7, 1, 1, 0.7),
        # A false mask above both: precision 2 / 3 all along.
        ([(strip(35, 60), 0.9), (A, 0.8), (B, 0.7)], 2 / 3, 2 / 3, 2 / 3, 1),
        ([], 0, 0, 0, 0),
    ],
)
def test_known_answers(found: list[Any], ap: float, ap50: float, ap75: float, ar100: float) -> None:
    scores = score_masks(truth(A, B), results(*found))
    assert (scores.ap, scores.ap50, scores.ap75, scores.ar100) == pytest.approx((ap, ap50, ap75, ar100))
    assert (scores.images, scores.instances, scores.masks) == (1, 2, len(found))


def test_crowds_are_neither_missed_nor_false() -> None:
    data = truth(A, B)
    data["annotations"][1]["iscrowd"] = 1
    assert score_masks(data, results((A, 0.5), (B, 0.9))).ap == pytest.approx(1)


def test_inputs_stay_as_they_are() -> None:
    data, found = truth(A), results((A, 1))
    before = repr((data, found))
    score_masks(data, found)
    assert repr((data, found)) == before


def test_a_file_may_have_categories_of_its_own(tmp_path: Path) -> None:
    data = truth(A) | {"categories": [{"id": 6, "name": "thing"}]}
    data["images"][0]["file_name"] = "a.png"
    (tmp_path / "images").mkdir()
    PIL.Image.new("L", (100, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "instances.json").write_text(json.dumps(data))
    found = [{**results((A, 1))[0], "category_id": 1}]
    (tmp_path / "pred.json").write_text(json.dumps(found))
    assert score_file(tmp_path, tmp_path / "pred.json").ap == pytest.approx(1)
    (tmp_path / "pred.json").write_text(json.dumps([{**found[0], "segmentation": None}]))
    with pytest.raises(DatasetError, match=r"pred.json: entry 0 \(image 1\) has no usable mask") as refused:
        score_file(tmp_path, tmp_path / "pred.json")
    assert "--skip-bad" not in str(refused.value)  # evaluate has no such option


def test_image_ids_may_be_text(tmp_path: Path) -> None:
    """`refine` and `instances` take and write them."""
    data = truth(A, B)
    data["images"] = [{**data["images"][0], "id": "street", "file_name": "a.png"}]
    for annotation in data["annotations"]:
        annotation["image_id"] = "street"
    (tmp_path / "images").mkdir()
    PIL.Image.new("L", (100, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "instances.json").write_text(json.dumps(data))
    found = [{**result, "image_id": "street"} for result in results((A, 0.9), (B, 0.5))]
    (tmp_path / "pred.json").write_text(json.dumps(found))
    scores = score_file(tmp_path, tmp_path / "pred.json", names=["a"])
    assert scores.ap == pytest.approx(1) and scores.instances == 2
    (sample,) = open_dataset(tmp_path)
    assert sample.name == "a" and sample.boundaries[0].any()


def test_a_data_set_may_number_its_images_as_it_likes(tmp_path: Path) -> None:
    """As `trace-sdk instances` does, from 1 on."""
    data = truth(A)
    data["images"] = [
        {"id": number, "file_name": name, "width": 100, "height": 20} for number, name in ((790, "a.png"), (1, "b.png"))
    ]
    data["annotations"] += [{**data["annotations"][0], "id": 9, "image_id": 790, "segmentation": encode_mask(B)}]
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        PIL.Image.new("L", (100, 20)).save(tmp_path / f"images/{name}.png")
    (tmp_path / "instances.json").write_text(json.dumps(data))
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in ((1, "a"), (2, "b"), (3, "elsewhere"))]
    entries = [{**results((mask, 1))[0], "image_id": number} for number, mask in ((1, B), (2, A), (3, A))]
    (tmp_path / "own.json").write_text(json.dumps({"images": images, "annotations": entries}))
    scores = score_file(tmp_path, tmp_path / "own.json")
    assert scores.ap == pytest.approx(1) and scores.masks == 2


@pytest.mark.parametrize("missing", ["id", "area", "bbox", "iscrowd", "category_id"])
def test_a_truth_may_lack_what_is_not_needed(missing: str, tmp_path: Path) -> None:
    """Some of these ended with a KeyError of pycocotools."""
    data = truth(A, B)
    del data["images"][0]["height"]
    data["images"][0]["file_name"] = "a.png"
    for annotation in data["annotations"]:
        del annotation[missing]
    (tmp_path / "images").mkdir()
    PIL.Image.new("L", (100, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (tmp_path / "pred.json").write_text(json.dumps([{**one, "category_id": 1} for one in results((A, 0.9), (B, 0.8))]))
    assert score_file(tmp_path, tmp_path / "pred.json").ap == pytest.approx(1)


def test_an_annotation_with_id_0_can_be_found() -> None:
    """pycocotools takes 0 for no match."""
    data = truth(A, B)
    data["annotations"][0]["id"] = 0
    assert score_masks(data, results((A, 0.9), (B, 0.8))).ap == pytest.approx(1)


def test_damaged_files(tmp_path: Path) -> None:
    data = truth(A)
    data["images"][0]["file_name"] = "a.png"
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"\x89PNG")
    (tmp_path / "pred.json").write_text(json.dumps([{**results((A, 1))[0], "category_id": 1}]))
    for content, message in (
        (data, r"a.png cannot be read"),
        (data | {"annotations": None}, "no list of them"),
        (data | {"annotations": [{}]}, "without image_id"),
        (truth(A, segmentation=[]) | {"images": data["images"]}, "annotation 1 has no readable mask"),
    ):
        (tmp_path / "instances.json").write_text(json.dumps(content))
        with pytest.raises(DatasetError, match=message):
            score_file(tmp_path, tmp_path / "pred.json")
        PIL.Image.new("L", (100, 20)).save(tmp_path / "images/a.png")


def test_bad_input() -> None:
    with pytest.raises(DatasetError, match="Results name image 2"):
        score_masks(truth(A), [{**results((A, 1))[0], "image_id": 2}])
    with pytest.raises(DatasetError, match="no image or no annotation"):
        score_masks({"images": [], "annotations": []}, [])
