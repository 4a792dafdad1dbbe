"""Readers of annotated photos: what they give, and what they say about malformed files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

pytest.importorskip("pycocotools", reason="needs trace-sdk[evaluate]")
pytest.importorskip("skimage", reason="needs trace-sdk[evaluate]")

from pycocotools import mask as codec
from scipy.io import savemat

from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.baselines import canny, lab_gradient
from trace_sdk.evaluation.datasets import instance_boundaries, open_dataset
from trace_sdk.evaluation.evaluate import annotator_agreement
from trace_sdk.instances.coco import decode_mask

SHARED = Path(__file__).parents[2] / "shared" / "data"


def photo(file: Path, height: int = 20, width: int = 30) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file)


def square(left: float, right: float) -> dict[str, Any]:
    return {
        "id": int(left),
        "image_id": 1,
        "iscrowd": 0,
        "segmentation": [[left, 5, right, 5, right, 15, left, 15]],
    }


def coco(folder: Path, *annotations: dict[str, Any], **image: Any) -> Path:
    photo(folder / "images" / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png"} | image], "annotations": list(annotations)}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def bsds(folder: Path, *boundaries: np.ndarray[Any, Any]) -> Path:
    photo(folder / "images" / "a.jpg")
    (folder / "groundTruth").mkdir()
    cells = np.empty((1, len(boundaries)), object)
    for i, boundary in enumerate(boundaries):
        cells[0, i] = {"Segmentation": boundary, "Boundaries": boundary}
    savemat(folder / "groundTruth" / "a.mat", {"groundTruth": cells})
    return folder


def scenes(folder: Path, ids: np.ndarray[Any, Any]) -> Path:
    photo(folder / "a.png")
    Image.fromarray(ids).save(folder / "a.ids.png")
    return folder


def test_two_touching_squares_share_one_line() -> None:
    ids = np.zeros((20, 30), np.int64)
    ids[5:15, 5:15], ids[5:15, 15:25] = 1, 2
    boundary = instance_boundaries(ids)
    assert np.flatnonzero(boundary[10]).tolist() == [4, 14, 24]
    assert np.flatnonzero(boundary[:, 10]).tolist() == [4, 14]
    assert not boundary[6:14, 5:14].any()


def test_image_border_is_no_boundary() -> None:
    assert not instance_boundaries(np.ones((8, 8), np.int64)).any()


def test_coco_polygons_and_smaller_on_top(tmp_path: Path) -> None:
    dataset = open_dataset(coco(tmp_path, square(10, 15), square(5, 25)))
    (sample,) = dataset
    assert (dataset.kind, dataset.names, len(dataset)) == ("coco", ("a",), 1)
    assert sample.rgb.shape == (20, 30, 3)
    assert np.flatnonzero(sample.boundaries[0][10]).tolist() == [4, 9, 14, 24]


def test_coco_run_lengths_and_crowds(tmp_path: Path) -> None:
    runs = {"size": [20, 30], "counts": [100, 20 * 10, 300]}
    plain = {"id": 1, "image_id": 1, "iscrowd": 0, "segmentation": runs}
    crowd = {"id": 2, "image_id": 1, "iscrowd": 1, "segmentation": {"size": [20, 30], "counts": [0, 600]}}
    (sample,) = open_dataset(coco(tmp_path, plain, crowd))
    assert np.flatnonzero(sample.boundaries[0][10]).tolist() == [4, 14]


@settings(max_examples=100, deadline=None)
@given(arrays(np.bool_, (11, 7)))
def test_compressed_run_lengths(mask: np.ndarray[Any, Any]) -> None:
    counts = codec.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    assert (decode_mask({"size": [11, 7], "counts": counts}, 11, 7) == mask).all()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_random_run_lengths_are_refused(counts: str) -> None:
    # pycocotools itself corrupts memory on some of these.
    with pytest.raises(ValueError, match="run lengths"):
        decode_mask({"size": [211, 307], "counts": counts}, 211, 307)


def test_bsds_has_a_map_for_each_annotator(tmp_path: Path) -> None:
    marked = np.zeros((20, 30), np.uint8)
    marked[:, 7] = 1
    (sample,) = open_dataset(bsds(tmp_path, marked, marked * 0))
    assert [int(boundary.sum()) for boundary in sample.boundaries] == [20, 0]


def test_bsds_boundaries_of_matlabs_usual_numbers(tmp_path: Path) -> None:
    (sample,) = open_dataset(bsds(tmp_path, np.eye(20, 30)))
    assert int(sample.boundaries[0].sum()) == 20


def test_two_bsds_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of the two was left out without a word."""
    whole_bsds(tmp_path)
    (tmp_path / "groundTruth/test").mkdir()
    shutil.copy(tmp_path / "groundTruth/a.mat", tmp_path / "groundTruth/test/a.mat")
    with pytest.raises(DatasetError, match=r"a\.mat and .*test/a\.mat have one name"):
        open_dataset(tmp_path)


def test_coco_photos_may_lie_in_folders(tmp_path: Path) -> None:
    """They were looked for in images/ itself, where --masks looked for them in folders."""
    coco(tmp_path, square(5, 15), file_name="val/a.png")
    assert len(list(open_dataset(tmp_path))) == 1
    (tmp_path / "images/val").mkdir()
    (tmp_path / "images/a.png").rename(tmp_path / "images/val/a.png")
    assert len(list(open_dataset(tmp_path))) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_instance_ids(tmp_path: Path, dtype: type) -> None:
    ids: np.ndarray[Any, Any] = np.zeros((20, 30), dtype)
    ids[:, 10:] = np.iinfo(dtype).max
    (sample,) = open_dataset(scenes(tmp_path, ids))
    assert np.flatnonzero(sample.boundaries[0][3]).tolist() == [9]


def test_first(tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"{name}.png")
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / f"{name}.ids.png")
    assert open_dataset(tmp_path).first(2).names == ("a", "b")
    assert len(open_dataset(tmp_path).first(None)) == 3


def spoil(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def whole_coco(folder: Path) -> Path:
    return coco(folder, square(5, 15))


def whole_bsds(folder: Path) -> Path:
    return bsds(folder, np.zeros((20, 30), np.uint8))


def whole_scenes(folder: Path) -> Path:
    return scenes(folder, np.zeros((20, 30), np.uint8))


@pytest.mark.parametrize(
    ("make", "harm", "said"),
    [
        (whole_coco, spoil("instances.json", b"not json"), "instances.json is not a COCO"),
        (whole_coco, spoil("instances.json", b"[]"), "instances.json is not a COCO"),
        (
            whole_coco,
            spoil("instances.json", b'{"images": [{"id": 1}], "annotations": []}'),
            "instances.json",
        ),
        (whole_coco, spoil("instances.json", b'{"images": [], "annotations": []}'), "no annotated image"),
        # Ids of the one as text, of the other as numbers: every score was 0.
        (whole_coco, lambda folder: coco(folder, square(5, 15), id="1"), "no instance in any of its images"),
        (whole_coco, spoil("images/a.png", b""), "a.png cannot be read"),
        (whole_coco, lambda folder: (folder / "images/a.png").unlink(), "a.png cannot be read"),
        (whole_bsds, spoil("groundTruth/a.mat", b""), "a.mat is not a BSDS500"),
        (
            whole_bsds,
            spoil("groundTruth/a.mat", b"MATLAB 5.0 MAT-file" + bytes(300)),
            "a.mat is not a BSDS500",
        ),
        (
            whole_bsds,
            lambda folder: savemat(folder / "groundTruth/a.mat", {"groundTruth": np.eye(3)}),
            "a.mat is not a BSDS500",
        ),
        (
            whole_bsds,
            lambda folder: savemat(folder / "groundTruth/a.mat", {"x": 1}),
            "a.mat is not a BSDS500",
        ),
        (whole_bsds, lambda folder: (folder / "images/a.jpg").unlink(), "a.jpg is missing"),
        (whole_bsds, lambda folder: photo(folder / "images/a.jpg", 21), "a.mat marks boundaries of size"),
        (whole_bsds, lambda folder: (folder / "groundTruth/a.mat").unlink(), "no annotated image"),
        (whole_scenes, spoil("a.ids.png", b"\x89PNG\r\n\x1a\n"), "a.ids.png cannot be read"),
        (whole_scenes, lambda folder: photo(folder / "a.ids.png"), "a.ids.png is not a grey PNG"),
        (whole_scenes, lambda folder: (folder / "a.png").unlink(), "is missing"),
        (whole_scenes, lambda folder: photo(folder / "a.png", 40), "a.ids.png is"),
        (whole_scenes, lambda folder: (folder / "a.ids.png").unlink(), "holds no data set"),
    ],
)
def test_malformed_data_sets(
    tmp_path: Path, make: Callable[[Path], Path], harm: Callable[[Path], object], said: str
) -> None:
    list(open_dataset(make(tmp_path)))
    harm(tmp_path)
    with pytest.raises(DatasetError, match=said):
        list(open_dataset(tmp_path))


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [["a", 2, 3, 4, 5, 6]],
        [[0, 0, 1e12, 0, 5, 5]],
        [[0, 0, float("nan"), 0, 5, 5]],
        {"size": [20, 30], "counts": [10**9]},
        {"size": [20, 30], "counts": [-5, 605]},
        {"size": [2000, 3000], "counts": [600]},
        {"size": [20, 30], "counts": "é"},
        {"counts": [600]},
    ],
)
def test_malformed_masks(tmp_path: Path, segmentation: object) -> None:
    coco(tmp_path, {"id": 7, "image_id": 1, "segmentation": segmentation})
    with pytest.raises(DatasetError, match="annotation 7 has no readable mask"):
        list(open_dataset(tmp_path))


def test_coco_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="30x99 there, its photo is 30x20"):
        list(open_dataset(coco(tmp_path, square(5, 15), width=30, height=99)))


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("baseline", [canny, lab_gradient])
def test_baselines_find_the_one_edge(baseline: Callable[..., Any]) -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:, 30:] = 200
    edges = baseline(rgb)
    assert edges.dtype == np.float32 and edges.shape == (40, 60)
    assert edges.min() >= 0 and edges.max() <= 1
    assert edges[20].argmax() in (29, 30)
    assert edges[20, 5] < 0.01


@pytest.mark.skipif(not (SHARED / "bsds500_val").is_dir(), reason="../shared/data/bsds500_val is not here")
def test_people_agree_as_published() -> None:
    agreement = annotator_agreement(open_dataset(SHARED / "bsds500_val").first(6))
    assert agreement is not None and 0.7 < agreement < 0.9


@pytest.mark.skipif(not (SHARED / "coco_val").is_dir(), reason="../shared/data/coco_val is not here")
def test_coco_val_is_read_whole() -> None:
    dataset = open_dataset(SHARED / "coco_val")
    assert len(dataset) == 84
    sample = dataset.read(dataset.names[0])
    assert 0.0005 < sample.boundaries[0].mean() < 0.1
    assert annotator_agreement(dataset.first(1)) is None
