"""The other scripts of the recipes on tiny inputs: unpacking, composing, measuring, averaging."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.evaluation.baselines import lab_gradient

RECIPE = Path(__file__).parents[1] / "recipes" / "trace-small"


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(RECIPE / f"{name}.py"), run_name="__main__")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Twenty cut-outs of (200, 100, 50) at alpha 128, 20×10 px; ten photos of three crops, grey 10, 20, … 100."""
    sprites = np.zeros((20, 4, 160, 160), np.uint8)
    sprites[:, :, 70:80, 60:80] = np.array([100, 50, 25, 128], np.uint8)[:, None, None]
    backs = np.zeros((30, 3, 256, 256), np.uint8)
    backs += (np.arange(30, dtype=np.uint8) // 3 * 10 + 10)[:, None, None, None]
    np.savez(tmp_path / "scenes.npz", sprites=sprites, backs=backs)
    return tmp_path / "scenes.npz"


class TestUnpack:
    def test_cutouts_get_straight_alpha_and_are_cropped(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_script(monkeypatch, "unpack", archive, tmp_path / "parts")
        for file in (tmp_path / "parts").glob("*/cutouts/*.png"):
            pixels = np.asarray(Image.open(file))
            assert pixels.shape == (10, 20, 4)
            assert np.abs(pixels[0, 0].astype(int) - (200, 100, 50, 128)).max() <= 2

    def test_the_last_tenth_is_held_out_and_no_photo_is_on_both_sides(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_script(monkeypatch, "unpack", archive, tmp_path / "parts")
        shades: dict[str, set[int]] = {}
        for part, cutouts, backgrounds in (("train", 18, 27), ("held-out", 2, 3)):
            assert len(list((tmp_path / "parts" / part / "cutouts").iterdir())) == cutouts
            crops = list((tmp_path / "parts" / part / "backgrounds").iterdir())
            assert len(crops) == backgrounds
            shades[part] = {int(np.asarray(Image.open(crop)).max()) for crop in crops}
        assert shades["held-out"] == {100}
        assert not shades["train"] & shades["held-out"]


class TestComposeScenes:
    def test_scenes_with_ids(self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_script(monkeypatch, "unpack", archive, tmp_path / "parts")
        options = ("--count", 4, "--size", 64)
        run_script(monkeypatch, "compose_scenes", tmp_path / "parts/train", tmp_path / "a", *options, "--ids")
        run_script(monkeypatch, "compose_scenes", tmp_path / "parts/train", tmp_path / "b", *options)
        assert len(list((tmp_path / "a").iterdir())) == 8 and len(list((tmp_path / "b").iterdir())) == 4
        instances = 0
        for file in sorted((tmp_path / "b").iterdir()):
            assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()  # the seed decides
            with Image.open(file) as scene, Image.open(tmp_path / "a" / f"{file.stem}.ids.png") as ids:
                assert (scene.size, scene.mode, ids.size, ids.mode) == ((64, 64), "RGB", (64, 64), "L")
                instances += len(np.unique(np.asarray(ids))) - 1
        assert instances >= 4


def test_teacher_edges_write_two_maps_for_each_sample(
    tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapped, the map is nowhere above the photo's colour gradient; plain, it spans [0, 1]."""
    tiny_backbone.save(tmp_path / "backbone")
    photo = Image.open(photos / "a.png").convert("RGB")
    (tmp_path / "set").mkdir()
    photo.save(tmp_path / "set/a.png")
    Image.fromarray(np.zeros((photo.height, photo.width), np.uint8)).save(tmp_path / "set/a.ids.png")
    options = ("--form", "log-per-head", "-t", "0.2", "--size", "96", "--tile", "64", "--block", "1")
    run_script(monkeypatch, "teacher_edges", tmp_path / "backbone", tmp_path / "out", tmp_path / "set", *options)
    plain, snapped = (np.load(tmp_path / "out" / form / "set/a.npy") for form in ("plain", "snapped"))
    assert plain.shape == snapped.shape == (photo.height, photo.width)
    assert plain.min() == 0 and plain.max() == 1
    gradient = lab_gradient(np.asarray(photo))
    assert (snapped <= gradient + 1e-6).all() and not np.allclose(snapped, gradient, atol=0.05)


def test_ablations_measure_the_rows_asked_for_and_say_which_are_not(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.open(photos / "a.png").convert("RGB")
    ids = np.zeros((photo.height, photo.width), np.uint8)
    ids[5:30, 5:30] = 1
    (tmp_path / "set").mkdir()
    photo.save(tmp_path / "set/a.png")
    Image.fromarray(ids).save(tmp_path / "set/a.ids.png")
    monkeypatch.syspath_prepend(RECIPE)
    options = ("--images", tmp_path, "--labels", tmp_path, "--row", "lab-gradient", "--row", "per-head form")
    run_script(monkeypatch, "ablations", tmp_path / "out", tmp_path / "set", *options)
    content = json.loads((tmp_path / "out/ablations.json").read_text())
    assert list(content["methods"]) == ["lab-gradient", "per-head form, t=.2"]
    assert content["methods"]["lab-gradient"]["set"]["images"] == 1
    assert "student: decoder alone" in content["not_measured"]
    assert "| trace-nano | not measured |" in (tmp_path / "out/ablations.md").read_text()
    (read,) = (tmp_path / "out/abdiv").rglob("a.npz")
    with np.load(read) as kept:
        assert (kept["abdiv"] >= 0).all() and kept["t"].tolist() == [0.2]


def test_random_backbone_is_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(monkeypatch, "random_backbone", tmp_path / "one")
    run_script(monkeypatch, "random_backbone", tmp_path / "two")
    assert PixelBackbone.load(tmp_path / "one").self_attention_blocks == 8
    assert PixelBackbone.sha256(tmp_path / "one") == PixelBackbone.sha256(tmp_path / "two")


def test_reliability_of_the_bundled_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a bright square nearly every pixel of high probability is on its outline."""
    ids = np.zeros((160, 200), np.uint8)
    ids[40:120, 50:150] = 1
    Image.fromarray(np.array([[20, 30, 40], [230, 200, 60]], np.uint8)[ids]).save(tmp_path / "a.png")
    Image.fromarray(ids).save(tmp_path / "a.ids.png")
    monkeypatch.setattr(sys, "argv", ["reliability.py", str(tmp_path), str(tmp_path / "out.png")])
    made = runpy.run_path(str(RECIPE.parent / "trace-nano" / "reliability.py"), run_name="__main__")
    outline = np.zeros((64, 64), bool)
    outline[20] = True
    number, total, near = made["count"](np.where(outline, np.float32(0.95), np.float32(0)), outline)
    assert number[9] == near[9] > 40 and total[9] == pytest.approx(0.95 * number[9])
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert "lab-gradient" in capsys.readouterr().out


SCRIPTS = sorted(file for file in RECIPE.parent.glob("*/*.py") if "__main__" in file.read_text())


@pytest.mark.parametrize("file", SCRIPTS, ids=[file.stem for file in SCRIPTS])
def test_help_and_a_wrong_argument(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(file.parent)  # as Python does for a script
    for argument, code in (("--help", 0), ("--nonsense", 2)):
        monkeypatch.setattr(sys, "argv", [file.name, argument])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(file), run_name="__main__")
        assert end.value.code == code
    assert f"usage: {file.name}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "fragment"),
    [
        ("unpack", ("nowhere.npz", "out"), "nowhere.npz does not exist"),
        ("unpack", ("a.txt", "out"), "a.txt is not an archive"),
        ("compose_scenes", ("nowhere", "out", "--count", 1), "cutouts does not exist"),
        ("sample_photos", ("nowhere", "out", "--count", 1), "nowhere does not exist"),
        ("sample_photos", ("photos", "a.txt", "--count", 1), "a.txt is a file"),
        ("random_backbone", ("a.txt",), "a.txt is a file"),
        ("teacher_edges", ("nowhere", "out", "data"), "nowhere is not a folder of weights"),
    ],
)
def test_what_is_wrong_is_one_line(
    name: str,
    arguments: tuple[object, ...],
    fragment: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (300, 100), (200, 100, 50)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, name, *arguments)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("error: ") and fragment in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["compose_scenes", "sample_photos"])
def test_fewer_than_one(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, name, "in", "out", "--count", -1)
    assert end.value.code == 2 and "--count: must be at least 1, got -1" in capsys.readouterr().err


def test_a_sample_keeps_photos_of_one_name_in_two_folders_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second took the place of the first."""
    for number, name in enumerate(("a/1.png", "b/1.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "in" / name)
    run_script(monkeypatch, "sample_photos", tmp_path / "in", tmp_path / "out", "--count", 2)
    for name in ("a/1.png", "b/1.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_the_mean_of_two_students(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trace_sdk.student.nano import NanoStudent

    photos, cutouts = tmp_path / "photos", tmp_path / "cutouts"
    for folder in (photos, cutouts):
        folder.mkdir()
    Image.new("RGB", (300, 300), (90, 120, 60)).save(photos / "plain.png")
    Image.new("RGBA", (300, 100), (200, 100, 50, 128)).save(cutouts / "stamp.png")
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        NanoStudent(0.4).save(tmp_path / name, {})
    folders = [str(tmp_path / name) for name in ("first", "second", "photos")]
    arguments = ["average.py", *folders, "--cutouts", str(cutouts), "-o", str(tmp_path / "mean")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(RECIPE.parent / "trace-nano/average.py"), run_name="__main__")
    first, second, mean = (NanoStudent.load(tmp_path / name) for name in ("first", "second", "mean"))
    expected = (first.stem[0][0].weight + second.stem[0][0].weight) / 2
    assert torch.allclose(mean.stem[0][0].weight, expected) and not torch.equal(expected, first.stem[0][0].weight)
    assert 0 < mean.threshold < 1
