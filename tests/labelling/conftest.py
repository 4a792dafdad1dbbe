"""Folders of photos to label, and what became of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.teacher.labels import CLAIMS
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SMALL = TeacherSettings(size=96, stride=300)


def picture(size: tuple[int, int] = (20, 16), colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def make_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the claims, by name."""
    files = [file for file in folder.rglob("*") if file.is_file() and CLAIMS not in file.parts]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def states(labels: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (labels / "manifest.jsonl").read_text().splitlines()]
    return {line["image"]: line["state"] for line in lines}


def job(backbone: PixelBackbone, images: Path, labels: Path, **more) -> LabelJob:
    return LabelJob(Teacher(backbone, SMALL), find_images(images), labels, "sha", batch=2, **more)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-one photos of two shapes in a folder and a tar, and one that is none."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)

    def noisy(number: int) -> bytes:
        buffer = io.BytesIO()
        shape = (72, 96, 3) if number % 3 else (96, 72, 3)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    write(folder, {f"p{number:02}.png": noisy(number) for number in range(15)} | {"p03b.png": b"not a picture"})
    make_tar(folder / "t.tar", {f"{number}.png": noisy(number) for number in range(6)})
    return folder


@pytest.fixture(scope="session")
def whole(tiny_backbone: PixelBackbone, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of a run that nothing cut."""
    labels = tmp_path_factory.mktemp("whole")
    summary = job(tiny_backbone, many, labels).run()
    assert (summary.done, summary.before, summary.elsewhere) == (21, 0, 0) and len(summary.t_star) == 21
    assert "p03b.png: is text" in summary.failed["p03b.png"]
    return labels


@pytest.fixture(scope="session", name="picture")
def picture_fixture() -> Callable[..., Any]:
    return picture


@pytest.fixture(scope="session", name="write")
def write_fixture() -> Callable[..., Any]:
    return write


@pytest.fixture(scope="session", name="make_tar")
def make_tar_fixture() -> Callable[..., Any]:
    return make_tar


@pytest.fixture(scope="session", name="contents")
def contents_fixture() -> Callable[..., Any]:
    return contents


@pytest.fixture(scope="session", name="states")
def states_fixture() -> Callable[..., Any]:
    return states


@pytest.fixture(scope="session", name="job")
def job_fixture() -> Callable[..., Any]:
    return job
