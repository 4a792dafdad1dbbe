from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result
from pycocotools import mask as codec

from trace_sdk.cli import main
from trace_sdk.detector import EdgeDetector
from trace_sdk.instances.coco import encode_mask

Run = Callable[..., Result]
HEIGHT, WIDTH = 96, 128
SQUARE = np.zeros((HEIGHT, WIDTH), np.bool_)
SQUARE[24:72, 40:88] = True
HOLED = SQUARE.copy()
HOLED[40:56, 56:72] = False


def plain(mask: Any) -> dict[str, Any]:
    """Run lengths as a list, starting with those of 0."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}


POLYGON = [[40.0, 24.0, 88.0, 24.0, 88.0, 72.0, 40.0, 72.0]]


def entry(segmentation: Any = None, **changes: Any) -> dict[str, Any]:
    mask = encode_mask(HOLED) if segmentation is None else segmentation
    return {"image_id": 790, "category_id": 1, "segmentation": mask, "score": 0.8, **changes}


def dataset(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    image = {"id": 790, "file_name": "000000000790.png", "width": WIDTH, "height": HEIGHT}
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    return {"images": [image], "categories": [{"id": 1, "name": "fg"}], "annotations": numbered, **changes}


@pytest.fixture
def run(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    grey = np.where(SQUARE, 230, 30).astype(np.uint8)
    Path("photos").mkdir()
    PIL.Image.fromarray(grey).save("photos/000000000790.png")
    PIL.Image.fromarray(255 - grey).save("photos/000000000791.png")

    def run(content: Any, *arguments: str) -> Result:
        Path("pred.json").write_text(content if isinstance(content, str) else json.dumps(content))
        fixed = ["--masks", "pred.json", "--images", "photos", "-o", "out.json", "--engine", str(tiny_engine)]
        return CliRunner().invoke(main, ["refine", *fixed, *arguments])

    return run


def written() -> Any:
    return json.loads(Path("out.json").read_bytes())


def overlap(result: dict[str, Any], mask: Any = SQUARE) -> float:
    found = codec.decode(result["segmentation"]).astype(bool)
    return float(np.count_nonzero(found & mask) / np.count_nonzero(found | mask))


@pytest.mark.parametrize("shape", [encode_mask(SQUARE), plain(SQUARE), POLYGON], ids=["compressed", "plain", "polygon"])
def test_every_spelling_of_a_mask(run: Run, shape: Any) -> None:
    result = run([entry(shape)])
    assert result.exit_code == 0, result.output
    (refined,) = written()
    assert overlap(refined) > 0.9 and isinstance(refined["segmentation"]["counts"], str)
    assert refined["image_id"] == 790 and refined["category_id"] == 1
    assert refined["bbox"] == codec.toBbox(refined["segmentation"]).tolist()
    assert refined["area"] == codec.area(refined["segmentation"])


def test_a_hole_is_closed_and_the_score_follows_the_rule(run: Run) -> None:
    assert run([entry()]).exit_code == 0
    (refined,) = written()
    assert overlap(refined) > 0.9
    assert refined["score"] == pytest.approx(0.8 * overlap(refined, HOLED), abs=1e-6)


def test_a_data_set_stays_a_data_set(run: Run) -> None:
    second = {"id": 791, "file_name": "000000000791.png", "width": WIDTH, "height": HEIGHT}
    content = dataset(entry(), entry(POLYGON, image_id=791), info={"description": "MaskCut"})
    content["images"].append(second)
    del content["annotations"][0]["score"]
    assert run(content).exit_code == 0
    data = written()
    assert data["images"] == content["images"] and data["categories"] == content["categories"]
    assert data["info"]["description"] == "MaskCut" and data["info"]["trace_sdk"]["engine"] == "tiny"
    assert [a["id"] for a in data["annotations"]] == [1, 2] and {a["iscrowd"] for a in data["annotations"]} == {0}
    assert [a["image_id"] for a in data["annotations"]] == [790, 791]


def test_names_come_from_annotations(run: Run) -> None:
    Path("photos/000000000790.png").rename("photos/street.png")
    content = dataset()
    content["images"][0] |= {"id": 5, "file_name": "street.png"}
    Path("val.json").write_text(json.dumps(content))
    assert run([entry(image_id=5)], "--annotations", "val.json").exit_code == 0
    assert written()[0]["image_id"] == 5


def test_categories_are_not_mixed_and_crowds_are_left_alone(run: Run) -> None:
    crowd = entry(encode_mask(HOLED), iscrowd=1, category_id=3)
    assert run([entry(), entry(category_id=2), entry(score=0.3), crowd]).exit_code == 0
    results = written()
    assert sorted(r["category_id"] for r in results) == [1, 2, 3]
    (kept,) = [r for r in results if r["category_id"] == 3]
    assert kept["segmentation"] == encode_mask(HOLED) and kept["iscrowd"] == 1


def wrong_size() -> dict[str, Any]:
    return encode_mask(np.ones((HEIGHT, WIDTH - 1), np.bool_))


def cut_off() -> dict[str, Any]:
    shape = encode_mask(HOLED)
    return {**shape, "counts": shape["counts"][:-3]}


BAD_ENTRIES = [
    (entry(wrong_size()), "entry 1 (image 790) has no usable mask: its size is"),
    (entry(cut_off()), "entry 1 (image 790) has no usable mask: its"),
    (entry({"size": [HEIGHT, WIDTH], "counts": [5, 7]}), "its run lengths do not add up"),
    (entry({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}), "has no usable mask: it is empty"),
    (entry([[100.0, 50.0, 140.0, 50.0, 140.0, 90.0]]), "it reaches outside the image, which is 128x96"),
    ({**entry(), "segmentation": None}, "has no usable mask: None is neither"),
    (entry([]), "entry 1 (image 790) has no usable mask: it is empty"),
    (entry({"size": [HEIGHT, WIDTH], "counts": "ooooooooo0"}), "its compressed run lengths are damaged"),
    (entry([[1.0, 2.0, 3.0]]), "a polygon needs at least three x, y pairs"),
    (entry([[1.0, 2.0, 3.0, 1e9, 5.0, 6.0]]), "a polygon lies far outside the image"),
    (entry("mask"), "has no usable mask: 'mask' is neither a list of polygons nor run lengths"),
    (entry(score="high"), "entry 1 has score 'high', not a finite number"),
    (entry(score=-0.5), "entry 1 has score -0.5, not a finite number of 0 or more"),
    (entry(score=10**400), "not a finite number of 0 or more"),
    (entry(id=[1]), "entry 1 has id [1]"),
    (entry({"size": [float("inf"), WIDTH], "counts": [0]}), "has no usable mask: OverflowError"),
    (entry(category_id=[1]), "entry 1 has category [1], which is not listed"),
    (entry(image_id=None), "entry 1 has image_id None"),
    (entry(image_id=123), "image 123 has no photo photos/000000000123.jpg"),
    ("text", "entry 1 is str, not an object"),
    (None, "entry 1 is null, not an object"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ENTRIES, ids=[message[:40] for _, message in BAD_ENTRIES])
def test_a_bad_entry_is_named_and_can_be_skipped(run: Run, bad: Any, message: str) -> None:
    content = [entry(), bad, entry(image_id=791)]
    result = run(content)
    assert result.exit_code == 1 and result.stderr.count("error: pred.json") == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert not Path("out.json").exists()
    for _ in range(2):  # and again when the good images are done already
        result = run(content, "--skip-bad")
        assert result.exit_code == 0, result.output
        assert message in result.stderr and ", 1 bad left out" in result.stdout
        assert [r["image_id"] for r in written()] == [790, 791]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "pred.json is not JSON"),
        ("3", "neither a list of COCO results nor a COCO data set"),
        ({"images": []}, "neither a list of COCO results nor a COCO data set"),
        ({"annotations": []}, "pred.json lists no images"),
        ([], "has no mask of a photo in photos"),
        (dataset(entry(id=4), entry(id=4)), "entry 1 repeats id 4"),
        (dataset(entry(category_id=9)), "entry 0 has category 9, which is not listed"),
        (dataset(entry(image_id=9)), "entry 0 belongs to image 9, which is not listed"),
        (dataset(entry(), images=dataset()["images"] * 2), "image id 790 is there twice"),
        (dataset(entry(), categories=[{"id": [1]}], images=[{"id": 790}]), "image 0 of the list has no id or"),
        (dataset(entry(), categories=None, images=[{"id": 790}]), "image 0 of the list has no id or"),
        (dataset(entry(), images=[{"id": 790}]), "image 0 of the list has no id or no file_name"),
        (dataset(entry(), images=[{"id": 790, "file_name": "gone.png"}]), "image 790 has no photo photos/gone.png"),
        (
            dataset(entry(), images=[{**dataset()["images"][0], "width": 100}]),
            "image 790 is 100x96 there, photos/000000000790.png is 128x96",
        ),
    ],
)
def test_bad_files(run: Run, content: Any, message: str) -> None:
    result = run(content)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_a_photo_that_cannot_be_read(run: Run) -> None:
    Path("photos/000000000790.png").write_bytes(b"\x89PNG damaged")
    content = [entry(), entry(image_id=791)]
    assert run(content).exit_code == 1
    result = run(content, "--skip-bad")
    assert result.exit_code == 0 and "error: photos/000000000790.png" in result.stderr
    assert [r["image_id"] for r in written()] == [791]


def test_a_photo_that_is_a_folder(run: Run) -> None:
    Path("photos/000000000790.png").unlink()
    Path("photos/000000000790.png").mkdir()
    result = run([entry(), entry(image_id=791)], "--skip-bad")
    assert result.exit_code == 0 and "image 790 has no photo" in result.stderr


def test_missing_files(run: Run, tiny_engine: Path) -> None:
    result = run([entry()], "--annotations", "gone.json")
    assert result.exit_code == 1 and "error: gone.json: No such file" in result.stderr
    arguments = ["refine", "--masks", "pred.json", "--images", "gone", "-o", "o.json", "--engine", str(tiny_engine)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "error: gone is not a folder" in result.stderr
    assert run([entry()], "--threshold", "2").exit_code == 2


def test_a_cut_run_goes_on_to_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [entry(), entry(image_id=791)]
    original = EdgeDetector.run
    done: list[str] = []

    def stop(self: EdgeDetector, image: Any) -> Any:
        if Path(image).stem.endswith("791"):
            raise KeyboardInterrupt
        return original(self, image)

    monkeypatch.setattr(EdgeDetector, "run", stop)
    result = run(content)
    assert result.exit_code == 130 and "1 of 2 images done and kept" in result.stderr and not Path("out.json").exists()
    monkeypatch.setattr(EdgeDetector, "run", lambda self, image: done.append(Path(image).stem) or original(self, image))
    result = run(content)
    assert result.exit_code == 0 and done == ["000000000791"] and "images/s beyond the edges" in result.stdout
    resumed = Path("out.json").read_bytes()
    for part in Path("out.json.parts").iterdir():
        part.unlink()
    assert run(content).exit_code == 0 and Path("out.json").read_bytes() == resumed
    # Another score is another job; nothing else is done again.
    done.clear()
    assert run([entry(), entry(image_id=791, score=0.1)]).exit_code == 0 and done == ["000000000791"]


def test_edges_of_others_in_place_of_an_engine(tiny_engine: Path, run: Run) -> None:
    assert run([entry()]).exit_code == 0
    Path("maps").mkdir()
    edges = EdgeDetector(tiny_engine).run("photos/000000000790.png")
    np.save("maps/000000000790.npy", edges.probability)
    fixed = ["refine", "--masks", "pred.json", "--images", "photos", "-o", "other.json", "--edges", "maps"]
    result = CliRunner().invoke(main, [*fixed, "--threshold", "0.4"])
    assert result.exit_code == 0, result.output
    assert json.loads(Path("other.json").read_bytes()) == written()
    # Another map is another job: an edge around the hole keeps it.
    ring = np.zeros_like(edges.probability)
    ring[39:57, 55:73], ring[41:55, 57:71] = 1, 0
    np.save("maps/000000000790.npy", ring)
    assert CliRunner().invoke(main, [*fixed, "--threshold", "0.4"]).exit_code == 0
    assert json.loads(Path("other.json").read_bytes())[0]["segmentation"] == encode_mask(HOLED)
    assert CliRunner().invoke(main, fixed).exit_code == 2
    # As `trace-sdk detect` names them.
    Path("maps/000000000790.npy").unlink()
    edges.save("maps/000000000790.edges.png")
    assert CliRunner().invoke(main, [*fixed, "--threshold", "0.4"]).exit_code == 0
    assert json.loads(Path("other.json").read_bytes())[0]["bbox"] == written()[0]["bbox"]
    PIL.Image.new("L", (9, 7)).save("maps/000000000790.edges.png")
    result = CliRunner().invoke(main, [*fixed, "--threshold", "0.4"])
    assert result.exit_code == 1 and "790.edges.png is [7, 9], its photo is [96, 128]" in result.stderr
    result = CliRunner().invoke(main, [*fixed, "--threshold", "0.4", "--skip-bad"])
    assert result.exit_code == 0 and "1 bad left out" in result.stdout and "images/s" not in result.stdout
    Path("maps/000000000790.edges.png").unlink()
    result = CliRunner().invoke(main, [*fixed, "--threshold", "0.4"])
    assert result.exit_code == 1 and "maps/000000000790.png is missing" in result.stderr
    result = CliRunner().invoke(main, [*fixed, "--threshold", "0.4", "--skip-bad"])
    assert result.exit_code == 0 and json.loads(Path("other.json").read_bytes()) == []


def test_edges_of_photos_in_sub_folders(tiny_engine: Path, run: Run) -> None:
    """Video frames have one name in many folders; `trace-sdk detect` keeps those, and only one map was looked for."""
    assert run([entry()]).exit_code == 0
    images = []
    for number, scene in enumerate(("bear", "swan")):
        Path("photos", scene).mkdir()
        shutil.copy("photos/000000000790.png", f"photos/{scene}/00000.png")
        images.append({**dataset()["images"][0], "id": number, "file_name": f"{scene}/00000.png"})
    Path("pred.json").write_text(json.dumps(dataset(entry(id=1, image_id=0), entry(id=2, image_id=1), images=images)))
    arguments = ["detect", "photos", "-o", "maps", "--format", "tif", "--engine", str(tiny_engine)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    arguments = ["refine", "--masks", "pred.json", "--images", "photos", "-o", "o.json", "--edges", "maps"]
    result = CliRunner().invoke(main, [*arguments, "--threshold", "0.4"])
    assert result.exit_code == 0, result.output
    found = json.loads(Path("o.json").read_bytes())["annotations"]
    assert [one["bbox"] for one in found] == [written()[0]["bbox"]] * 2
    # A map for both would be wrong for one of them.
    Path("maps/bear/00000.edges.tif").replace("maps/00000.tif")
    result = CliRunner().invoke(main, [*arguments, "--threshold", "0.4"])
    assert result.exit_code == 1 and "maps/bear/00000.png is missing" in result.stderr


def test_options_that_contradict(run: Run) -> None:
    assert run([entry()], "--edges", "photos", "--threshold", "0.4", "--size", "64").exit_code == 2
    Path("pred.json").write_text(json.dumps([entry()]))
    same = ["refine", "--masks", "pred.json", "--images", "photos", "-o", "./pred.json"]
    result = CliRunner().invoke(main, same)
    assert result.exit_code == 2 and "pred.json is read here" in result.stderr


def test_workers_give_the_same_bytes(run: Run) -> None:
    content = [entry(), entry(image_id=791), entry(image_id=791, segmentation={"size": [1, 1], "counts": [1]})]
    assert run(content, "--skip-bad").exit_code == 0
    alone = Path("out.json").read_bytes()
    for part in Path("out.json.parts").iterdir():
        part.unlink()
    result = run(content, "--skip-bad", "--workers", "2")
    assert result.exit_code == 0 and "1 bad left out" in result.stdout and "in 2 processes" in result.stdout
    assert Path("out.json").read_bytes() == alone
