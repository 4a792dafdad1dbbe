"""The recipe's scripts on tiny inputs: packing, unpacking, composing."""

from __future__ import annotations

import io
import json
import runpy
import struct
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.baselines import lab_gradient

RECIPE = Path(__file__).parents[1] / "recipes" / "trace-small"


def script(name: str) -> dict[str, Any]:
    with patch.object(sys, "path", [str(RECIPE), *sys.path]):  # as Python does for a script
        return runpy.run_path(str(RECIPE / f"{name}.py"))


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(RECIPE / f"{name}.py"), run_name="__main__")


def stamp(width: int = 300, height: int = 100) -> Image.Image:
    """A half-clear red block, 20 px of nearly clear border around it."""
    pixels = np.zeros((height + 40, width + 40, 4), np.uint8)
    pixels[..., 3] = 16
    pixels[20:-20, 20:-20] = (200, 100, 50, 128)
    return Image.fromarray(pixels)


class TestPackScenes:
    def test_cutouts_are_cropped_to_alpha_scaled_and_centred(self) -> None:
        packed = script("pack_scenes")["pack_cutout"](stamp())
        assert packed.shape == (4, 160, 160) and packed.dtype == np.uint8
        rows, columns = np.nonzero(packed[3])
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (55, 104, 5, 154)  # 150×50 of 300×100

    def test_cutouts_are_premultiplied(self) -> None:
        packed = script("pack_scenes")["pack_cutout"](stamp())
        assert packed[:, 80, 80].tolist() == [100, 50, 25, 128]  # round(c · 128/255)
        assert packed[:3].max(0).max() <= packed[3].max()
        assert not packed[:, 0, 0].any()

    def test_thin_cutouts_keep_a_pixel(self) -> None:
        packed = script("pack_scenes")["pack_cutout"](stamp(width=900, height=1))
        assert np.count_nonzero(packed[3].any(1)) == 1

    def test_backgrounds_give_three_square_crops_inside_the_photo(self) -> None:
        # Red is the column, green the row: a crop's range shows how large it is and where it lies.
        column, row = np.meshgrid(np.arange(200), np.arange(120))
        photo = Image.fromarray(np.stack([column, row, 0 * row], -1).astype(np.uint8))
        crops = script("pack_scenes")["pack_background"](np.random.default_rng(1), photo)
        assert crops.shape == (3, 3, 256, 256) and crops.dtype == np.uint8
        for crop, side in zip(crops, (120, 84, 60), strict=True):
            assert int(crop[0].max()) - int(crop[0].min()) == side - 1
            assert int(crop[1].max()) - int(crop[1].min()) == side - 1

    def test_pack_keeps_the_lists_order_and_repeats_itself(self, tmp_path: Path) -> None:
        (tmp_path / "root/a").mkdir(parents=True)
        for name, colour in (("1.png", 50), ("2.png", 200)):
            image = stamp()
            image.paste((colour, 0, 0, 255), (20, 20, 320, 120))
            image.save(tmp_path / "root/a" / name)
            Image.new("RGB", (40, 30), (0, colour, 0)).save(tmp_path / "root/a" / f"back-{name}")
        listed = tmp_path / "list.txt"
        listed.write_text("sprites\na/2.png\na/1.png\nbackgrounds\na/back-1.png\na/back-2.png\n")
        pack = script("pack_scenes")["pack"]
        for out in ("one", "two"):
            pack(tmp_path / "root", tmp_path / out / "scenes.npz", listed)
        data = np.load(tmp_path / "one/scenes.npz", allow_pickle=False)
        assert data["sprites"][:, 0, 80, 80].tolist() == [200, 50]
        assert data["backs"][:, 1, 0, 0].tolist() == [50] * 3 + [200] * 3
        assert (tmp_path / "one/scenes.npz").read_bytes() == (tmp_path / "two/scenes.npz").read_bytes()
        assert (tmp_path / "one/SOURCES.txt").read_text() == listed.read_text()

    def test_a_missing_file_is_named_and_nothing_written(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("sprites\na/gone.png\nbackgrounds\n")
        with pytest.raises(SystemExit, match=r"gone\.png"):
            script("pack_scenes")["pack"](tmp_path, tmp_path / "scenes.npz", tmp_path / "list.txt")
        assert not (tmp_path / "scenes.npz").exists()

    def test_the_committed_list_is_of_the_named_packages(self) -> None:
        functions = script("pack_scenes")
        cutouts, backgrounds = functions["read_sources"](functions["SOURCES"])
        assert (len(cutouts), len(backgrounds)) == (353, 96)
        assert cutouts == sorted(set(cutouts)) and len(set(backgrounds)) == 96
        assert {name.partition("/")[0] for name in (*cutouts, *backgrounds)} == functions["PACKAGES"].keys()


def resources(files: dict[str, bytes], packed: bool) -> bytes:
    """A Qt resource file, version 2, with one folder `photos` that holds the files."""
    names, offsets = b"", []
    for name in ("photos", *files):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    contents, places = b"", []
    for content in files.values():
        places.append(len(contents))
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        contents += struct.pack(">I", len(stored)) + stored
    entries = [struct.pack(">IHIIQ", 0, 2, 1, 1, 0), struct.pack(">IHIIQ", offsets[0], 2, len(files), 2, 0)]
    entries += [
        struct.pack(">IHHHIQ", offset, packed, 0, 1, place, 0)
        for offset, place in zip(offsets[1:], places, strict=True)
    ]
    tree = b"".join(entries)
    middle = 20 + len(tree)
    return struct.pack(">4s4I", b"qres", 2, 20, middle, middle + len(contents)) + tree + contents + names


class TestPackVaried:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "root/a").mkdir(parents=True)
        inside = io.BytesIO()
        Image.new("RGB", (2048, 1024), (200, 0, 0)).save(inside, "PNG")
        (tmp_path / "root/a/b.rcc").write_bytes(resources({"one.txt": b"?", "cat.png": inside.getvalue()}, packed=True))
        Image.new("RGB", (64, 48)).save(tmp_path / "root/a/dog.jpg")
        return tmp_path / "root"

    def test_photos_come_in_order_and_no_larger_than_1024(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a/b.rcc:/photos/cat.png\na/dog.jpg\n")
        assert script("pack_varied")["pack"](root, tmp_path / "out", tmp_path / "list.txt") == 2
        files = sorted((tmp_path / "out").iterdir())
        assert [file.name for file in files] == ["000-cat.png", "001-dog.png"]
        assert [Image.open(file).size for file in files] == [(1024, 512), (64, 48)]
        assert Image.open(files[0]).getpixel((0, 0)) == (200, 0, 0)

    @pytest.mark.parametrize("name", ["a/b.rcc:/photos/gone.png", "a/gone.jpg", "a/gone.rcc:/photos/cat.png"])
    def test_a_missing_file_is_named_and_nothing_written(self, root: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "list.txt").write_text(f"a/dog.jpg\n{name}\n")
        with pytest.raises(SystemExit, match="gone"):
            script("pack_varied")["pack"](root, tmp_path / "out", tmp_path / "list.txt")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("packed", [False, True])
    def test_damaged_resources_are_an_error(self, tmp_path: Path, packed: bool) -> None:
        whole = resources({"x": bytes(100), "y": b"1"}, packed)
        read = script("debian_packages")["qt_resources"]
        (tmp_path / "a.rcc").write_bytes(whole)
        assert read(tmp_path / "a.rcc") == {"/photos/x": bytes(100), "/photos/y": b"1"}
        for damaged in (b"", b"RIFF" + whole[4:], whole[:30], whole[:-2]):
            (tmp_path / "a.rcc").write_bytes(damaged)
            with pytest.raises(DatasetError, match=r"a\.rcc is not a Qt resource file"):
                read(tmp_path / "a.rcc")

    def test_the_committed_list_has_nothing_of_the_held_out_scenes(self) -> None:
        functions, scenes = script("pack_varied"), script("pack_scenes")
        names = functions["VARIED"].read_text().split()
        assert len(names) == len(set(names)) == 304
        assert {name.partition("/")[0] for name in names} == functions["PACKAGES"].keys()
        assert not set(names) & set(scenes["read_sources"](scenes["SOURCES"])[1][-10:])


class TestPackPhotos:
    @pytest.fixture
    def sets(self, tmp_path: Path) -> Path:
        """A set of each kind; the flower lies in another folder than the list says, one name comes twice in gro."""
        photos = {
            "cid/CID22/7.png": (512, 512),
            "gro/dataset/train/Lime/Lime_001.jpg": (348, 464),
            "gro/dataset/test/Lime/Lime_001.jpg": (300, 300),
            "flo/mirror/roses/5_ab.jpg": (240, 160),
        }
        for name, size in photos.items():
            (tmp_path / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(tmp_path / "sets" / name)
        return tmp_path / "sets"

    LIST = (
        "cid22-00000\tcid/CID22/7.png\n"
        "grocery-00001\tgro/dataset/train/Lime/Lime_001.jpg\n"
        "grocery-00002\tgro/dataset/test/Lime/Lime_001.jpg\n"
        "flowers-00003\tflo/dataset/train/roses/5_ab.jpg\n"
    )

    def test_only_large_groceries_and_flowers_are_scaled(self, sets: Path, tmp_path: Path) -> None:
        (tmp_path / "list.tsv").write_text(self.LIST)
        pack = script("pack_photos")["pack"]
        assert pack(sets, tmp_path / "out", tmp_path / "list.tsv") == 4
        sizes = {file.name: Image.open(file).size for file in (tmp_path / "out").iterdir()}
        assert sizes == {
            "cid22-00000.webp": (512, 512),
            "grocery-00001.webp": (256, 341),
            "grocery-00002.webp": (256, 256),
            "flowers-00003.webp": (240, 160),
        }
        assert pack(sets, tmp_path / "out", tmp_path / "list.tsv") == 0

    def test_a_missing_photo_is_named_and_nothing_written(self, sets: Path, tmp_path: Path) -> None:
        (tmp_path / "list.tsv").write_text(self.LIST + "cq100-00004\tcq/img/gone.png\n")
        with pytest.raises(SystemExit, match=r"1 of 5 .*gone\.png"):
            script("pack_photos")["pack"](sets, tmp_path / "out", tmp_path / "list.tsv")
        assert not (tmp_path / "out").exists()

    def test_the_committed_list(self) -> None:
        lines = [line.split("\t") for line in (RECIPE / "FILES.tsv").read_text().splitlines()]
        assert len(lines) == len({name for name, _ in lines}) == 5609
        by_name = script("pack_photos")["BY_NAME"]
        found = [Path(file).name for _, file in lines if file.startswith(by_name)]
        assert len(found) == len(set(found))  # a name alone tells one from another


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
    stamp().save(tmp_path / "photos" / "a.png")
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, name, *arguments)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("error: ") and fragment in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["compose_scenes", "sample_photos"])
def test_fewer_than_one(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, name, "in", "out", "--count", -1)
    assert end.value.code == 2 and "--count must be at least 1, got -1" in capsys.readouterr().err


def test_the_mean_of_two_students(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trace_sdk.student.nano import NanoStudent

    photos, cutouts = tmp_path / "photos", tmp_path / "cutouts"
    for folder in (photos, cutouts):
        folder.mkdir()
    Image.new("RGB", (300, 300), (90, 120, 60)).save(photos / "plain.png")
    stamp().save(cutouts / "stamp.png")
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
