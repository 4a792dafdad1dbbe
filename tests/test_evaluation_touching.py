"""Contacts between instances of one class: where they lie, what counts as right and wrong on them, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from trace_sdk.cli import main
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.edges import ContactScores, count_edges, score_edges
from trace_sdk.evaluation.touching import find_touching

SHAPE = (240, 320)  # diagonal 400: a gap of 3 px counts as none


def three(gap: int = 0) -> Any:
    """Three squares in a row, 80 px each; the gap lies between the first two."""
    ids = np.zeros(SHAPE, np.int64)
    ids[80:160, 40:120], ids[80:160, 120 + gap : 200], ids[80:160, 200:280] = 1, 2, 3
    return ids


@pytest.mark.parametrize(
    ("gap", "classes", "columns"),
    [
        (0, "aab", {119}),
        (0, "aba", set()),
        (0, "aaa", {119, 199}),
        (2, "aab", {120}),
        (6, "aab", set()),
    ],
)
def test_the_line_runs_between_touching_instances_of_one_class(gap: int, classes: str, columns: set[int]) -> None:
    found = find_touching(three(gap), dict(enumerate(classes, start=1)))
    y, x = np.nonzero(found.line)
    assert set(x.tolist()) == columns
    if columns:
        assert y.min() in range(78, 82) and y.max() in range(157, 163)  # a filled gap is rounded at its ends


def test_only_the_inside_of_touching_instances_is_judged() -> None:
    judged = find_touching(three(), {1: "a", 2: "a", 3: "b"}).judged
    assert judged[120, 60] and judged[120, 119] and judged[120, 150]
    assert not judged[120, 240] and not judged[20, 20]  # another class; background
    assert not judged[120, 41] and not judged[120, 199] and not judged[81, 100]  # other outlines


def edges(*lines: tuple[Any, Any]) -> Any:
    found = np.zeros(SHAPE, np.float32)
    for line in lines:
        found[line] = 0.9
    return found


CONTACT = (slice(80, 160), 119)


@pytest.mark.parametrize(
    ("lines", "precision", "recall"),
    [
        ([CONTACT], 1, 1),
        ([(slice(80, 120), 119)], 1, 0.5),
        ([(slice(80, 160), 121)], 1, 1),  # within 3 px
        ([(slice(80, 160), 126)], 0, 0),
        ([CONTACT, (slice(100, 140), 60)], 2 / 3, 1),  # inside of an instance
        ([CONTACT, (80, slice(40, 280)), (slice(10, 60), 200), (slice(80, 160), 240)], 1, 1),  # nobody's business
        ([], 0, 0),
    ],
)
def test_known_answers(lines: list[Any], precision: float, recall: float) -> None:
    touching = find_touching(three(), {1: "a", 2: "a", 3: "b"})
    counts = count_edges(edges(*lines), [touching.line], thresholds=3, touching=touching)
    scores = score_edges([counts, counts]).contacts
    assert scores is not None and scores.pixels == 2 * np.count_nonzero(touching.line)
    assert (scores.precision, scores.recall) == pytest.approx((precision, recall), abs=0.03)


def test_without_contacts_there_is_no_score() -> None:
    apart = find_touching(three(), {1: "a", 2: "b", 3: "a"})
    counts = count_edges(edges(CONTACT), [edges(CONTACT) > 0], thresholds=3, touching=apart)
    assert score_edges([counts]).contacts is None


@pytest.mark.parametrize(
    ("precision", "recall"), [(0.9, 0.1), (0.5, 0.4), (0.4, 0.6), (0.2, 0.8), (0.0, 0.8), (0.91, 0.0)]
)
def test_recall_at_a_precision_is_read_off_the_curve(precision: float, recall: float) -> None:
    scores = ContactScores(0, 0, 0, 0, 1, precisions=(0.3, 0.5, 0.9), recalls=(0.8, 0.4, 0.1))
    assert scores.recall_at(precision) == pytest.approx(recall, abs=0.01)


def test_coco_categories_and_id_maps(tmp_path: Path) -> None:
    (tmp_path / "coco/images").mkdir(parents=True)
    photo = Image.fromarray(np.zeros((*SHAPE, 3), np.uint8))
    photo.save(tmp_path / "coco/images/a.png")
    annotations = [
        {"id": k, "image_id": 1, "category_id": category, "iscrowd": 0,
         "segmentation": [[x, 80, x + 80, 80, x + 80, 160, x, 160]]}
        for k, x, category in ((1, 40, 7), (2, 120, 7), (3, 200, 8))
    ]  # fmt: skip
    images = [{"id": 1, "file_name": "a.png", "width": SHAPE[1], "height": SHAPE[0]}]
    (tmp_path / "coco/instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (sample,) = open_dataset(tmp_path / "coco")
    assert sample.touching is not None
    assert set(np.nonzero(sample.touching.line)[1].tolist()) == {119}

    (tmp_path / "ids").mkdir()
    photo.save(tmp_path / "ids/a.png")
    Image.fromarray(three().astype(np.uint8)).save(tmp_path / "ids/a.ids.png")
    (sample,) = open_dataset(tmp_path / "ids")
    assert sample.touching is not None
    assert set(np.nonzero(sample.touching.line)[1].tolist()) == {119, 199}


def test_the_table_compares_at_the_precision_of_canny(tmp_path: Path) -> None:
    """Two things of one grey that touch: only the map that knows the contact has recall on it."""
    (tmp_path / "ids").mkdir()
    (tmp_path / "maps").mkdir()
    ids = three()
    Image.fromarray(np.where(ids[..., None] > 0, np.uint8([200, 60, 60]), np.uint8([20, 30, 40]))).save(
        tmp_path / "ids/a.png"
    )
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "ids/a.ids.png")
    (sample,) = open_dataset(tmp_path / "ids")
    np.save(tmp_path / "maps/a.npy", sample.boundaries[0].astype(np.float32))
    arguments = ["evaluate", tmp_path / "ids", "-o", tmp_path / "out", "--edges", f"mine={tmp_path / 'maps'}"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--thresholds", "5", "--workers", "1"])
    assert result.exit_code == 0, result.output
    methods = json.loads((tmp_path / "out/quality.json").read_text())["methods"]
    assert methods["mine"]["ids"]["touching_recall"] == pytest.approx(1, abs=0.03)
    assert methods["mine"]["ids"]["contacts"]["f"] == pytest.approx(1, abs=0.03)
    assert methods["canny"]["ids"]["touching_recall"] < 0.3 and methods["canny"]["ids"]["contacts"]["f"] < 0.3
    assert "ids touch R" in (tmp_path / "out/quality.md").read_text()
