from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result
from pycocotools.coco import COCO

from trace_sdk.cli import main
from trace_sdk.detector import EdgeDetector

Run = Callable[..., Result]


def photo(name: str, left: int = 40) -> None:
    """60 × 90, a bright square on dark ground."""
    grey = np.full((60, 90), 40, np.uint8)
    grey[15:45, left : left + 30] = 220
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(grey).convert("RGB").save(name)


@pytest.fixture
def run(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["instances", *arguments, "-o", "out", "--engine", str(tiny_engine)])

    return run


def coco() -> Any:
    return json.loads(Path("out/instances.json").read_bytes())


def test_a_folder_gives_pictures_and_one_coco_file(run: Run, tiny_engine: Path) -> None:
    photo("in/b.png", 40)
    photo("in/sub/a.png", 10)
    result = run("in")
    assert result.exit_code == 0, result.output
    assert PIL.Image.open("out/b.instances.jpg").size == PIL.Image.open("out/sub/a.instances.jpg").size == (90, 60)
    data = coco()
    assert [image["file_name"] for image in data["images"]] == ["b.png", "sub/a.png"]
    assert [annotation["id"] for annotation in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    info = data["info"]
    assert info["engine"] == "tiny" and info["engine_sha256"].encode() in tiny_engine.read_bytes()
    assert info["version"] == "0.1.0" and info["size"] == 128 and info["threshold"] == 0.4
    loaded = COCO("out/instances.json")
    for image, left in ((1, 40), (2, 10)):
        masks = [loaded.annToMask(a) for a in loaded.loadAnns(loaded.getAnnIds(imgIds=image))]
        assert (sum(masks) == 1).all()
        square = np.zeros((60, 90), np.bool_)
        square[15:45, left : left + 30] = True
        assert max(np.count_nonzero(m & square) / np.count_nonzero(m | square) for m in masks) > 0.85
    assert result.stdout.startswith("2 photos → out: ") and "(tiny on cpu, size 128, threshold 0.4)" in result.stdout


def test_a_second_run_does_only_what_changed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        photo(name, 20)
    assert run("in").exit_code == 0
    whole = Path("out/instances.json").read_bytes()
    done: list[str] = []
    original = EdgeDetector.run
    monkeypatch.setattr(EdgeDetector, "run", lambda self, image: done.append(Path(image).name) or original(self, image))
    result = run("in")
    assert done == [] and Path("out/instances.json").read_bytes() == whole and "(3 were done already)" in result.stdout
    Path("out/b.instances.jpg").unlink()
    photo("in/c.png", 50)
    assert run("in").exit_code == 0 and done == ["b.png", "c.png"]
    assert run("in", "--threshold", "0.2").exit_code == 0 and done[2:] == ["a.png", "b.png", "c.png"]
    assert coco()["info"]["threshold"] == 0.2


def test_a_cut_run_goes_on_to_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        photo(name, 20)
    original = EdgeDetector.run

    def stop(self: EdgeDetector, image: Any) -> Any:
        if Path(image).name == "c.png":
            raise KeyboardInterrupt
        return original(self, image)

    monkeypatch.setattr(EdgeDetector, "run", stop)
    result = run("in")
    assert result.exit_code == 130 and "2 of 3 photos done" in result.stderr and not Path("out/instances.json").exists()
    monkeypatch.setattr(EdgeDetector, "run", original)
    assert run("in").exit_code == 0
    resumed = Path("out/instances.json").read_bytes()
    for file in Path("out/.instances").iterdir():
        file.unlink()
    assert run("in").exit_code == 0 and Path("out/instances.json").read_bytes() == resumed


def test_a_bad_file_is_reported_and_the_others_are_done(run: Run) -> None:
    photo("a.png")
    Path("b.png").write_bytes(b"no picture")
    result = run("a.png", "b.png", "gone.png")
    assert result.exit_code == 1
    assert "error: b.png: is text, not a picture" in result.stderr and "error: gone.png: No such file" in result.stderr
    assert [image["file_name"] for image in coco()["images"]] == ["a.png"]
    assert result.stdout.startswith("1 photo → out, 2 failed: ")


def test_photos_of_one_name_keep_their_own(run: Run) -> None:
    photo("x/a.png", 10)
    photo("y/a.png", 50)
    assert run("x", "y").exit_code == 0
    assert [image["file_name"] for image in coco()["images"]] == ["x/a.png", "y/a.png"]
    assert {path.name for path in Path("out").glob("*.jpg")} == {"a.png.instances.jpg", "a.png-2.instances.jpg"}


def test_a_damaged_part_is_done_again(run: Run) -> None:
    photo("a.png")
    assert run("a.png").exit_code == 0
    whole = Path("out/instances.json").read_bytes()
    for file in Path("out/.instances").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert run("a.png").exit_code == 0 and Path("out/instances.json").read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["empty"], 2, "No photo found in empty"),
        (["a.png", "--threshold", "2"], 2, "--threshold"),
        (["a.png", "--min-area", "-1"], 2, "--min-area"),
        (["a.png", "--device", "cuda:99"], 1, "error: "),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], code: int, message: str) -> None:
    photo("a.png")
    Path("empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == code and message in result.stderr
