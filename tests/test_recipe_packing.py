"""The scripts that pack training images from public packages, on tiny ones: what is taken, how, and what is refused."""

from __future__ import annotations

import io
import runpy
import struct
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from trace_sdk.errors import DatasetError

RECIPE = Path(__file__).parents[1] / "recipes" / "trace-small"


def script(name: str) -> dict[str, Any]:
    with patch.object(sys, "path", [str(RECIPE), *sys.path]):  # as Python does for a script
        return runpy.run_path(str(RECIPE / f"{name}.py"))


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
