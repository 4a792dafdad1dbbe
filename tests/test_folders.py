"""Files below a folder: linked folders, each file once, no ring without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trace_sdk.cli.photos import find_photos
from trace_sdk.folders import files_below
from trace_sdk.labelling.images import find_images
from trace_sdk.pretraining.training_images import list_photos


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """photos/ with a folder of its own and one that is linked, from which a link leads back."""
    folder = tmp_path / "photos"
    for name in ("photos/a.jpg", "photos/in/b.jpg", "photos/.hidden/c.jpg", "elsewhere/d.jpg", "elsewhere/deep/e.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(folder / "in")
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    return folder


def test_linked_folders_are_followed_and_each_file_is_met_once(linked: Path) -> None:
    found = sorted(file.relative_to(linked).as_posix() for file in files_below(linked))
    assert found == ["a.jpg", "again/d.jpg", "again/deep/e.jpg", "in/b.jpg"]


def test_commands_see_the_photos_of_linked_folders(linked: Path, tmp_path: Path) -> None:
    """They were left out without a word."""
    seen = [image.name for image in find_images(linked)]
    assert seen == ["a.jpg", "again/d.jpg", "again/deep/e.jpg", "in/b.jpg"]
    assert [str(file.relative_to(linked)) for file in list_photos([linked])] == seen
    jobs = find_photos([str(linked)], tmp_path / "out")
    assert sorted(str(job.relative) for job in jobs) == seen
    assert [job.relative.name for job in find_photos([str(linked)], linked / "in")] == ["a.jpg", "d.jpg", "e.jpg"]
    assert [job.relative.name for job in find_photos([str(linked / "in")], linked)] == ["b.jpg"]
