"""Semantics and edges to panoptic segments, the three conventions of labels, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from trace_sdk.cli import main
from trace_sdk.detector import EdgeDetector
from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.instances.label_sets import read_label_set, voc_palette
from trace_sdk.instances.panoptic import read_semantic, segment_values

HEIGHT, WIDTH = 80, 120


def scene() -> tuple[EdgeMap, Any]:
    """Two persons (15) that touch at column 60, a dog (12) apart, background, a void frame at the left."""
    semantic = np.zeros((HEIGHT, WIDTH), np.uint8)
    semantic[20:61, 20:101], semantic[66:78, 50:90], semantic[:, :4] = 15, 12, 255
    edges = np.zeros((HEIGHT, WIDTH), np.float32)
    for column in (20, 60, 100):
        edges[20:61, column] = 1
    edges[20, 20:101] = edges[60, 20:101] = 1
    return EdgeMap(edges, np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5), semantic


def test_things_are_split_and_stuff_is_one() -> None:
    edges, semantic = scene()
    found = edges.panoptic(semantic, "voc")
    assert sorted(s["category_id"] for s in found.segments) == [0, 12, 15, 15]
    assert (found.ids == 0).sum() == (semantic == 255).sum()
    left, right = found.ids[40, 30], found.ids[40, 90]
    assert left != right and {found.segments[i - 1]["category_id"] for i in (left, right)} == {15}
    assert abs(int((found.ids == left).sum()) - 41 * 40) < 41 * 3
    for segment in found.segments:
        own = found.ids == segment["id"]
        y, x = np.nonzero(own)
        assert segment["area"] == own.sum() and segment["iscrowd"] == 0
        assert segment["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        # Edges never change a label.
        assert {segment["category_id"]} == set(np.unique(semantic[own]).tolist())


def test_without_the_edge_they_are_one_and_specks_are_void() -> None:
    edges, semantic = scene()
    open_map = EdgeMap(edges.probability * (np.arange(WIDTH) != 60), edges.rgb, 0.5)
    semantic[2:4, 110:112] = 15
    found = open_map.panoptic(semantic, "voc", min_area=16)
    assert [s["category_id"] for s in found.segments].count(15) == 1
    assert (found.ids[2:4, 110:112] == 0).all()


def test_two_stuff_areas_are_one_segment_two_thing_areas_are_two(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(
        json.dumps([{"id": 3, "name": "sky", "isthing": 0}, {"id": 4, "name": "kite", "isthing": 1}])
    )
    semantic = np.full((HEIGHT, WIDTH), 3)
    semantic[:, 50:60], semantic[10:30, 10:30], semantic[10:30, 80:100] = 0, 4, 4
    flat = EdgeMap(np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5)
    found = flat.panoptic(semantic, str(tmp_path / "own.json"))
    assert [s["category_id"] for s in found.segments] == [3, 4, 4]
    assert found.ids[0, 0] == found.ids[0, 119] and found.ids[0, 55] == 0
    assert found.plot().size == (WIDTH, HEIGHT)


def test_coco_picture_of_segments() -> None:
    edges, semantic = scene()
    found = edges.panoptic(semantic)
    assert (segment_values(np.asarray(found.to_png())) == found.ids).all()
    entry = found.to_coco(7, "a.png")
    assert entry["image_id"] == 7 and set(entry["segments_info"][0]) == {"id", "category_id", "area", "bbox", "iscrowd"}
    assert segment_values(np.array([[[1, 2, 3]]], np.uint8)).item() == 1 + 2 * 256 + 3 * 65536


@pytest.mark.parametrize(
    ("name", "value", "category", "thing"),
    [
        ("voc", 15, (15, "person"), True),
        ("voc", 0, (0, "background"), False),
        ("coco-stuff", 1, (1, "person"), True),
        ("coco-stuff", 90, (90, "toothbrush"), True),
        ("coco-stuff", 182, (182, "wood"), False),
        ("coco-stuff", 149, (149, "road"), False),
        ("coco-stuff-maps", 0, (1, "person"), True),
        ("coco-stuff-maps", 156, (157, "sky-other"), False),
        ("cityscapes", 26, (26, "car"), True),
        ("cityscapes-train", 13, (26, "car"), True),
        ("cityscapes-train", 0, (7, "road"), False),
    ],
)
def test_known_labels(name: str, value: int, category: tuple[int, str], thing: bool) -> None:
    found = read_label_set(name).values[value]
    assert (found.id, found.name) == category and found.thing == thing


@pytest.mark.parametrize(
    ("name", "things", "stuff"),
    [("voc", 20, 1), ("coco-stuff", 80, 91), ("coco-stuff-maps", 80, 91), ("cityscapes", 8, 11)],
)
def test_counts_of_known_labels(name: str, things: int, stuff: int) -> None:
    thing = [category.thing for category in read_label_set(name).values.values()]
    assert (sum(thing), len(thing) - sum(thing)) == (things, stuff)


def test_void_of_cityscapes() -> None:
    assert {0, 3, 9, 14, 29, 255} <= read_label_set("cityscapes").void


def test_it_is_shown_in_a_line_and_as_a_picture() -> None:
    """As edges and instances are; its repr was some hundred lines of arrays."""
    edges, semantic = scene()
    found = edges.panoptic(semantic, "voc")
    assert re.fullmatch(r"Panoptic\(\d things, \d stuff in 120x80, labels='voc'\)", repr(found))
    assert found._repr_png_().startswith(b"\x89PNG")
    assert repr(edges.sam_prompts(points=2)).endswith(" boxes with 2 points each in 120x80)")
    assert repr(edges.refine(semantic[None] > 0)).endswith(" sides in 120x80)")


@pytest.mark.parametrize("mode", ["grey", "palette", "colour", "16 bit", "LA", "RGBA"])
def test_every_kind_of_picture(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1, 15], [20, 255, 8]], np.uint8)
    picture = PIL.Image.fromarray(values)
    if mode == "palette":
        picture.putpalette(voc_palette().ravel().tolist())
    elif mode == "colour":
        picture = PIL.Image.fromarray(voc_palette()[values])
    elif mode == "16 bit":
        picture = PIL.Image.fromarray(values.astype(np.uint16))
    elif mode == "LA":
        picture = picture.convert("LA")
    elif mode == "RGBA":
        picture = PIL.Image.fromarray(voc_palette()[values]).convert("RGBA")
    picture.save(tmp_path / "a.png")
    assert (read_semantic(tmp_path / "a.png", read_label_set("voc")) == values).all()


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (np.full((4, 4), 21, np.uint8), "voc", "has value 21, which voc has not"),
        (np.full((4, 4), 12, np.uint8), "coco-stuff", "has value 12"),
        (np.full((4, 4, 3), 7, np.uint8), "voc", r"has colour \[7, 7, 7\]"),
        (np.zeros((4, 4, 3), np.uint8), "cityscapes", "cityscapes has no palette"),
    ],
)
def test_bad_pictures(tmp_path: Path, values: Any, labels: str, said: str) -> None:
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=said):
        read_semantic(tmp_path / "a.png", read_label_set(labels))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no list of categories"),
        ("[]", "lists no category"),
        ('[{"id": 1, "name": "a"}]', "is no list of categories"),
        ('[{"id": 1, "name": "a", "isthing": 1}, {"id": 1, "name": "b", "isthing": 1}]', "one id twice"),
    ],
)
def test_bad_label_files(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(DatasetError, match=said):
        read_label_set(str(tmp_path / "own.json"))


def test_bad_arguments() -> None:
    edges, semantic = scene()
    with pytest.raises(ArgumentError, match="labels='ade' is unknown"):
        edges.panoptic(semantic, "ade")
    with pytest.raises(ArgumentError, match="as large as the picture"):
        edges.panoptic(semantic[:-1])
    with pytest.raises(ArgumentError, match="has value 99"):
        edges.panoptic(np.full_like(semantic, 99))


Run = Callable[..., Result]


@pytest.fixture
def run(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "labels"):
        Path(folder).mkdir()
    ids = np.zeros((96, 128), np.uint8)
    ids[24:72, 20:60], ids[24:72, 60:100] = 1, 2
    PIL.Image.fromarray(np.array([100, 230, 10], np.uint8)[ids]).save("photos/s_7_leftImg8bit.png")
    PIL.Image.fromarray(np.array([23, 26, 26], np.uint8)[ids]).save("labels/s_7_gtFine_labelIds.png")
    PIL.Image.fromarray(np.array([120, 10, 240], np.uint8)[ids]).save("photos/s_9.png")
    PIL.Image.fromarray(np.array([23, 24, 24], np.uint8)[ids]).save("labels/s_9.png")

    def run(*arguments: str) -> Result:
        fixed = ["--semantic", "labels", "--images", "photos", "-o", "out", "--engine", str(tiny_engine)]
        return CliRunner().invoke(main, ["panoptic", *fixed, "--labels", "cityscapes", *arguments])

    return run


def test_command_writes_coco_panoptic(run: Run) -> None:
    result = run("--plot")
    assert result.exit_code == 0, result.output
    assert "2 pictures → out/panoptic.json: 4 things, 2 stuff segments" in result.stdout
    content = json.loads(Path("out/panoptic.json").read_bytes())
    # "s_7_leftImg8bit" ends in no number, so images are counted.
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert {c["id"]: c["isthing"] for c in content["categories"]}[26] == 1
    first = content["annotations"][0]
    ids = segment_values(np.asarray(PIL.Image.open(Path("out/panoptic", first["file_name"]))))
    for segment in first["segments_info"]:
        assert (ids == segment["id"]).sum() == segment["area"]
    assert ids[48, 40] != ids[48, 80] and (ids > 0).all()
    assert len(list(Path("out/plots").iterdir())) == 2


def test_a_second_run_does_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run().exit_code == 0
    first = Path("out/panoptic.json").read_bytes()
    monkeypatch.setattr(EdgeDetector, "run", lambda self, image: pytest.fail("done again"))
    assert run().exit_code == 0 and Path("out/panoptic.json").read_bytes() == first


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda: Path("photos/s_9.png").unlink(), "labels/s_9.png has no photo of the same stem"),
        (lambda: Path("labels/s_9.png").write_bytes(b"\x89PNG"), "labels/s_9.png cannot be read"),
        (lambda: Path("photos/s_9.png").write_bytes(b"\x89PNG"), "photos/s_9.png"),
        (lambda: PIL.Image.new("L", (128, 95), 23).save("labels/s_9.png"), "labels/s_9.png is 128x95, its photo"),
        (lambda: PIL.Image.new("L", (128, 96), 99).save("labels/s_9.png"), "labels/s_9.png has value 99"),
    ],
)
def test_bad_files_are_named_and_can_be_skipped(run: Run, harm: Callable[[], object], said: str) -> None:
    harm()
    result = run()
    assert result.exit_code == 1 and said in result.stderr and "Traceback" not in result.output
    result = run("--skip-bad")
    assert result.exit_code == 0 and said in result.stderr and "1 pictures →" in result.stdout
    assert "1 bad left out" in result.stdout


def test_wrong_usage(run: Run) -> None:
    assert run("--labels", "ade").exit_code == 2
    assert run("--semantic", "gone").exit_code == 1
    Path("labels/more").mkdir()
    Path("labels/more/s_9.png").write_bytes(Path("labels/s_9.png").read_bytes())
    result = run()
    assert result.exit_code == 1 and "same stem" in result.stderr
