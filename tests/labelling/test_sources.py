"""What is labelled: folders, patterns, lists, COCO, VOC and WebDataset tars, and what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trace_sdk.errors import DatasetError, ImageError
from trace_sdk.labelling.images import find_images

COCO = json.dumps({"images": [{"file_name": "b.png"}, {"file_name": "more/a.png"}], "annotations": "unread"}).encode()


@pytest.mark.parametrize(
    ("files", "given", "names"),
    [
        (["b.jpg", "a.PNG", "more/c.webp", "notes.md", ".a.jpg", ".git/x.png"], ".", ["a.PNG", "b.jpg", "more/c.webp"]),
        (["a.jpg"], "a.jpg", ["a.jpg"]),
        (["in/a.jpg", "in/b/a.jpg", "in/b.png"], "in/**/*.jpg", ["a.jpg", "b/a.jpg"]),
        (["x1/a.jpg", "x2/a.jpg"], "x?", ["x1/a.jpg", "x2/a.jpg"]),
        (["JPEGImages/1.jpg", "SegmentationClass/1.png", "Annotations/1.xml"], ".", ["1.jpg"]),
        (["train/1.jpg", "annotations/panoptic/1.png"], ".", ["train/1.jpg"]),
    ],
)  # fmt: skip
def test_names_are_relative_to_what_was_given(
    files: list[str], given: str, names: list[str], tmp_path: Path, write: Any
) -> None:
    write(tmp_path, dict.fromkeys(files, b"x"))
    found = find_images(tmp_path / given)
    assert [image.name for image in found] == names
    assert all(image.read() == b"x" for image in found)


def test_lists_name_paths_and_voc_ids(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "voc/JPEGImages", {"2007_1.jpg": b"1", "2007_2.jpg": b"2"})
    write(tmp_path / "voc/ImageSets/Main", {"cat_train.txt": b"2007_2  1\n2007_1 -1\n"})
    voc = find_images(tmp_path / "voc/ImageSets/Main/cat_train.txt")
    assert [(image.name, image.read()) for image in voc] == [("2007_2.jpg", b"2"), ("2007_1.jpg", b"1")]
    write(tmp_path / "lists", {"in/a.png": b"a"})
    (tmp_path / "lists/all.txt").write_text(f"in/a.png\n\n../voc/JPEGImages/2007_1.jpg\n{tmp_path}/gone.jpg\n")
    found = find_images(tmp_path / "lists/all.txt")
    inside = str(tmp_path).lstrip("/")
    assert [image.name for image in found] == [
        "in/a.png", f"{inside}/voc/JPEGImages/2007_1.jpg", f"{inside}/gone.jpg",
    ]  # fmt: skip
    assert found[1].read() == b"1"


def test_a_list_of_windows_and_a_tar_in_capitals(tmp_path: Path, write: Any, make_tar: Any) -> None:
    """The mark before the first line became a part of its name, and the tar was taken for a picture."""
    write(tmp_path, {"list.TXT": b"\xef\xbb\xbfa.png\r\nb.png\r\n"})
    assert [image.name for image in find_images(tmp_path / "list.TXT")] == ["a.png", "b.png"]
    make_tar(tmp_path / "x.TAR", {"a.jpg": b"a"})
    assert [image.read() for image in find_images(tmp_path)] == [b"a"]


def test_a_link_to_nothing_fails_by_its_name(tmp_path: Path) -> None:
    """It was left out without a word."""
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "away.jpg")
    [image] = find_images(tmp_path)
    with pytest.raises(ImageError, match=r"gone\.jpg: No such file"):
        image.read()


@pytest.mark.parametrize(("name", "fragment"), [(b"bad\xff.jpg", "is not UTF-8"), (b"x" * 245 + b".jpg", "is longer")])
def test_names_that_no_label_can_have(name: bytes, fragment: str, tmp_path: Path) -> None:
    """They ended in a traceback, of Python's or of the system's."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    with pytest.raises(DatasetError, match=f"{fragment}.* Rename the photo"):
        find_images(tmp_path)


@pytest.mark.parametrize("folder", ["images", "val2017", "images/val2017", "annotations"])
def test_coco_names_images_wherever_they_lie(folder: str, tmp_path: Path, write: Any) -> None:
    write(tmp_path, {f"{folder}/b.png": b"b", f"{folder}/more/a.png": b"a", f"{folder}/unlisted.png": b""})
    write(tmp_path, {"annotations/instances_val2017.json": COCO})
    found = find_images(tmp_path / "annotations/instances_val2017.json")
    assert [(image.name, image.read()) for image in found] == [("b.png", b"b"), ("more/a.png", b"a")]


def test_one_image_for_each_key_of_a_tar(tmp_path: Path, make_tar: Any) -> None:
    members = {"./s/1.png": b"mask", "./s/1.jpg": b"one", "s/1.json": b"{}", "s/2.seg.png": b"mask", "s/2.webp": b"two",
               "._s.jpg": b"", "../out.jpg": b"three"}  # fmt: skip
    make_tar(tmp_path / "train-0.tar", members)
    make_tar(tmp_path / "train-1.tar", {"1.jpg": b"four"})
    found = {image.name: image.read() for image in find_images(tmp_path / "*.tar")}
    assert sorted(name for name in found if "out" not in name) == [
        "train-0.tar/s/1.jpg", "train-0.tar/s/2.webp", "train-1.tar/1.jpg",
    ]  # fmt: skip
    assert sorted(found.values()) == [b"four", b"one", b"three", b"two"]
    assert not any(".." in name for name in found), "a label would lie outside of its folder"
    assert found == {image.name: image.read() for image in find_images(tmp_path)}


@pytest.mark.parametrize(
    ("name", "data", "fragment"),
    [
        ("empty/readme.md", b"", "No photos in"),
        ("a.tar.gz", b"\x1f\x8b", "Unpack it"),
        ("a.tar", b"no tar at all", "not a whole, uncompressed tar"),
        ("a.json", b"[]", "not a COCO file"),
        ("a.json", b'{"images": [{"file_name": "gone.jpg"}]}', "in none of"),
        ("a.txt", b"\xff\xfe\xff", "list of paths"),
    ],
)
def test_malformed_sources(name: str, data: bytes, fragment: str, tmp_path: Path, write: Any) -> None:
    write(tmp_path, {name: data})
    with pytest.raises(DatasetError, match=fragment):
        find_images(tmp_path / name if "empty" not in name else tmp_path / "empty")


def test_a_tar_that_was_cut_short(tmp_path: Path, picture: Any, make_tar: Any) -> None:
    make_tar(tmp_path / "a.tar", {"1.png": picture(), "2.png": bytes(5000)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 2 + 512 + 2000])
    with pytest.raises(DatasetError, match=r"a\.tar"):
        find_images(tmp_path / "a.tar")


def test_two_images_of_one_name_are_refused_and_one_image_twice_is_not(tmp_path: Path, write: Any) -> None:
    write(tmp_path, {"one/a.png": b"1", "two/a.png": b"2"})
    with pytest.raises(DatasetError, match=r"both be called a\.png"):
        find_images([tmp_path / "one", tmp_path / "two"])
    assert len(find_images([tmp_path / "one", str(tmp_path / "one/*.png")])) == 1
