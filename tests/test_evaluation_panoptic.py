"""Panoptic quality: hand-made cases, a slow independent count, and the command on masks and segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.panoptic import (
    SegmentCounts,
    Segmented,
    count_segments,
    open_panoptic,
    score_panoptic,
    score_segments,
)
from trace_sdk.instances.coco import encode_mask

ROAD, CAR = 7, 26
THINGS = {ROAD: False, CAR: True}


def row(*lengths: tuple[int, int]) -> Any:
    """One line of pixels: (id, length), …"""
    return np.concatenate([np.full(length, number) for number, length in lengths])[None]


TRUTH = Segmented(row((1, 10), (2, 10), (3, 20)), {1: CAR, 2: CAR, 3: ROAD})


@pytest.mark.parametrize(
    ("found", "things", "stuff"),
    [
        (TRUTH, (1, 1, 1), (1, 1, 1)),
        # The second car has 8 of 10 pixels, the road 20 of 22.
        (Segmented(row((5, 10), (6, 8), (7, 22)), {5: CAR, 6: CAR, 7: ROAD}), (0.9, 0.9, 1), (20 / 22, 20 / 22, 1)),
        # Both cars as one: IoU 10 / 20 is no match; one false, two missed.
        (Segmented(row((5, 20), (7, 20)), {5: CAR, 7: ROAD}), (0, 0, 0), (1, 1, 1)),
        # One car missed: rq = 1 / (1 + 1 / 2); its pixels make the road 20 of 30.
        (Segmented(row((5, 10), (7, 30)), {5: CAR, 7: ROAD}), (2 / 3, 1, 2 / 3), (2 / 3, 2 / 3, 1)),
        # The right place, the wrong category.
        (Segmented(row((5, 10), (6, 10), (7, 20)), {5: CAR, 6: ROAD, 7: ROAD}), (2 / 3, 1, 2 / 3), (2 / 3, 1, 2 / 3)),
        # Void in the answer: nothing is found there.
        (Segmented(row((5, 10), (0, 10), (7, 20)), {5: CAR, 7: ROAD}), (2 / 3, 1, 2 / 3), (1, 1, 1)),
    ],
)
def test_known_answers(found: Segmented, things: tuple[float, ...], stuff: tuple[float, ...]) -> None:
    counts: dict[int, SegmentCounts] = {}
    count_segments(TRUTH, found, counts)
    scores = score_segments(counts, THINGS, 1)
    assert scores.things is not None and scores.stuff is not None
    assert (scores.things.pq, scores.things.sq, scores.things.rq) == pytest.approx(things)
    assert (scores.stuff.pq, scores.stuff.sq, scores.stuff.rq) == pytest.approx(stuff)
    assert scores.all.pq == pytest.approx((things[0] + stuff[0]) / 2)


def counted(truth: Segmented, found: Segmented) -> dict[int, tuple[int, int, int]]:
    counts: dict[int, SegmentCounts] = {}
    count_segments(truth, found, counts)
    return {category: (one.matched, one.false, one.missed) for category, one in counts.items()}


@pytest.mark.parametrize(
    ("truth", "found", "counts"),
    [
        # More than half in void: not false. Half in it: false.
        (row((0, 20), (1, 10)), row((5, 11), (6, 9), (7, 10)), {CAR: (1, 0, 0)}),
        (row((0, 10), (3, 20)), row((5, 20), (7, 10)), {CAR: (0, 1, 0), ROAD: (0, 1, 1)}),
        # Pixels that are void in the truth are left out of the IoU: 10 of 10, not of 25.
        (row((0, 15), (1, 10)), row((5, 25)), {CAR: (1, 0, 0)}),
        # A crowd is neither found nor missed, and excuses its own category only.
        (row((4, 20), (3, 10)), row((5, 20), (7, 10)), {ROAD: (1, 0, 0)}),
        (row((4, 20), (1, 10)), row((7, 20), (5, 10)), {CAR: (1, 0, 0), ROAD: (0, 1, 0)}),
        (row((4, 20), (1, 10)), row((0, 30)), {CAR: (0, 0, 1)}),
    ],
)
def test_void_and_crowds(truth: Any, found: Any, counts: dict[int, tuple[int, int, int]]) -> None:
    road = (truth == 0).sum() != 20  # there, segment 7 is the car
    categories = {1: CAR, 3: ROAD, 4: CAR, 5: CAR, 6: CAR, 7: ROAD if road else CAR}
    crowds = frozenset({4})
    assert counted(Segmented(truth, categories, crowds), Segmented(found, categories)) == counts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_against_a_slow_count(seed: int) -> None:
    """Masks one by one, as the paper writes it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 5, (2, 4, 5))
    truth, found = (np.kron(part, np.ones((2, 2), np.int64)) for part in small)
    found = np.where(rng.random(found.shape) < 0.7, truth, found)
    of_truth, of_found = ({i: int(rng.integers(1, 3)) for i in range(1, 5)} for _ in range(2))
    crowds = frozenset({4} if seed % 2 else ())
    expected: dict[int, list[float]] = {}
    taken = set()
    for a in set(truth.ravel().tolist()) - {0} - crowds:
        best = 0.0
        for b in set(found.ravel().tolist()) - {0}:
            one, other = truth == a, (found == b) & (truth != 0)
            iou = (one & other).sum() / (one | other).sum()
            if of_truth[a] == of_found[b] and iou > 0.5:
                best = iou
                taken.add(b)
        row = expected.setdefault(of_truth[a], [0, 0, 0, 0])
        row[0] += best > 0
        row[1] += best
        row[3] += best == 0
    for b in set(found.ravel().tolist()) - {0} - taken:
        own = found == b
        ignored = (truth == 0) | np.isin(truth, [a for a in crowds if of_truth[a] == of_found[b]])
        if (own & ignored).sum() / own.sum() <= 0.5:
            expected.setdefault(of_found[b], [0, 0, 0, 0])[2] += 1
    counts: dict[int, SegmentCounts] = {}
    count_segments(Segmented(truth, of_truth, crowds), Segmented(found, of_found), counts)
    assert {c: [n.matched, pytest.approx(n.iou), n.false, n.missed] for c, n in counts.items()} == expected


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"Segments are \[1, 9\]"):
        count_segments(TRUTH, Segmented(row((1, 9)), {1: CAR}), {})
    with pytest.raises(ArgumentError, match="Segment 9 has no category"):
        count_segments(TRUTH, Segmented(row((9, 40)), {1: CAR}), {})
    with pytest.raises(DatasetError, match="no segment"):
        score_segments({}, THINGS, 0)


def write(folder: Path, name: str, ids: Any, categories: dict[int, int], crowds: tuple[int, ...] = ()) -> Path:
    """A panoptic data set of one image."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.stack([ids % 256, ids // 256, ids * 0], 2).astype(np.uint8)).save(folder / name / "a.png")
    segments = [{"id": i, "category_id": c, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": int(i in crowds)}
                for i, c in categories.items()]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": ROAD, "name": "road", "isthing": 0}, {"id": CAR, "name": "car", "isthing": 1}],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Two cars (300 and 301) that touch, on a road; a data set and an answer that has them as one."""
    ids = np.full((60, 80), 2)
    ids[20:40, 10:40], ids[20:40, 40:70] = 300, 301
    write(tmp_path / "street", "panoptic", ids, {2: ROAD, 300: CAR, 301: CAR})
    write(tmp_path, "one", np.minimum(ids, 300), {2: ROAD, 300: CAR})
    (tmp_path / "street/images").mkdir()
    rgb = np.where(ids[..., None] > 2, np.uint8([200, 40, 40]), np.uint8([60, 60, 60]))
    PIL.Image.fromarray(rgb).save(tmp_path / "street/images/a.jpg", quality=95)
    return tmp_path


def test_edges_of_panoptic_truth(street: Path) -> None:
    (sample,) = open_dataset(street / "street")
    assert sample.boundaries[0][30, 39] and sample.boundaries[0][30, 9] and not sample.boundaries[0][30, 20]
    assert sample.touching is not None and set(np.nonzero(sample.touching.line)[1].tolist()) == {39}


def test_command_on_panoptic_files(street: Path) -> None:
    arguments = ["evaluate", f"{street}/street", "-o", f"{street}/out", "--panoptic", f"one={street}/one.json"]
    result = CliRunner().invoke(main, [*arguments, "--panoptic", f"same={street}/street/panoptic.json"])
    assert result.exit_code == 0, result.output
    content = json.loads((street / "out/quality.json").read_text())
    assert content["panoptic"]["same"]["street"]["all"] == {"pq": 1, "sq": 1, "rq": 1, "categories": 2}
    assert content["panoptic"]["one"]["street"]["things"]["pq"] == 0
    assert content["panoptic"]["one"]["street"]["stuff"]["pq"] == 1
    assert content["methods"] == {} and "Panoptic quality" in (street / "out/quality.md").read_text()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "one.json").write_text("{}"), "one.json is not a COCO panoptic file"),
        (lambda f: (f / "one/a.png").unlink(), "a.png cannot be read"),
        (lambda f: write(f, "one", np.full((60, 80), 5), {4: CAR}), "has segment 5, which"),
        (lambda f: write(f, "one", np.full((60, 81), 4), {4: CAR}), "image 1: Segments are"),
        (lambda f: (f / "one.json").unlink(), "one.json: No such file"),
    ],
)
def test_malformed_files(street: Path, harm: Any, said: str) -> None:
    harm(street)
    with pytest.raises(DatasetError, match=said):
        score_panoptic(open_panoptic(street / "street"), open_panoptic(street / "one.json"))


def test_command_on_masks(tmp_path: Path) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    PIL.Image.new("RGB", (100, 20)).save(tmp_path / "set/images/a.png")
    mask = np.zeros((20, 100), np.bool_)
    mask[:, 10:50] = True
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": encode_mask(mask), "area": 800,
                  "bbox": [10, 0, 40, 20], "iscrowd": 0}  # fmt: skip
    images = [{"id": 1, "file_name": "a.png", "width": 100, "height": 20}]
    (tmp_path / "set/instances.json").write_text(json.dumps({"images": images, "annotations": [annotation]}))
    good = {"image_id": 1, "score": 0.5, "segmentation": [[10, 0, 50, 0, 50, 20, 10, 20]]}
    (tmp_path / "good.json").write_text(json.dumps([good]))
    (tmp_path / "none.json").write_text(json.dumps([]))
    (tmp_path / "bad.json").write_text(json.dumps([{**good, "segmentation": None}]))
    base = ["evaluate", f"{tmp_path}/set", "-o", f"{tmp_path}/out", "--masks", f"good={tmp_path}/good.json"]
    result = CliRunner().invoke(main, [*base, "--masks", f"none={tmp_path}/none.json"])
    assert result.exit_code == 0, result.output
    masks = json.loads((tmp_path / "out/quality.json").read_text())["masks"]
    assert masks["good"]["set"]["ap"] == pytest.approx(1) and masks["none"]["set"]["ap"] == 0
    result = CliRunner().invoke(main, [*base, "--masks", f"bad={tmp_path}/bad.json"])
    assert result.exit_code == 1 and "entry 0 (image 1) has no usable mask" in result.stderr
    result = CliRunner().invoke(main, [*base, "--panoptic", f"x={tmp_path}/good.json"])
    assert result.exit_code == 2 and "--panoptic needs a data set with panoptic.json" in result.stderr
