"""Answers that cannot be written, and commands that cannot be run: a defined message, quickly."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.errors import OutputError

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.tif"])
def test_no_half_file_on_a_full_disk(
    name: str, tmp_path: Path, detector: EdgeDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = detector.run(PHOTO)
    (tmp_path / name).write_bytes(b"older")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        edges.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"older"


def test_a_write_that_fails_midway(tmp_path: Path, detector: EdgeDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    edges = detector.run(PHOTO)
    monkeypatch.setattr(PIL.Image.Image, "save", fails)
    with pytest.raises(OutputError, match="has room"):
        edges.save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/sub", "{file}/sub"])
def test_a_folder_that_takes_no_files(folder: str, tmp_path: Path, detector: EdgeDetector) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = folder.format(file=tmp_path / "file")
    with pytest.raises(OutputError, match="Choose a folder"):
        detector.run(PHOTO).save(f"{folder}/a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_place_of_the_file(tmp_path: Path, detector: EdgeDetector) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png: Is a directory"):
        detector.run(PHOTO).save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# arguments after `detect`, exit code, a part of stderr; {good}, {bad}, {engine} and {out} are filled in
COMMANDS: list[tuple[str, int, str]] = [
    ("{bad} -o {out} --engine {engine}", 1, "text.jpg: is text"),
    ("{good} {bad} -o {out} --engine {engine}", 1, "text.jpg: is text"),
    ("missing.jpg -o {out} --engine {engine}", 1, "missing.jpg: no such file"),
    ("'*.nothing' -o {out} --engine {engine}", 2, "No photo found"),
    ("{empty} -o {out} --engine {engine}", 2, "No photo found"),
    ("-o {out} --engine {engine}", 2, "Missing argument"),
    ("{good} --engine {engine}", 2, "Missing option '-o'"),
    ("{good} -o {out} --engine missing.onnx", 1, "no such engine file"),
    ("{good} -o {out} --engine {bad}", 1, "is not a trace-sdk engine"),
    ("{good} -o {out} --engine {engine} --size 15", 2, "16<=x<=8192"),
    ("{good} -o {out} --engine {engine} --size big", 2, "not a valid integer"),
    ("{good} -o {out} --engine {engine} --format jpg", 2, "'png', 'npy', 'tif'"),
    ("{good} -o {out} --engine {engine} --device gpu", 2, "device='gpu' is not known"),
    ("{good} -o {bad} --engine {engine}", 1, "is a file. Give a folder"),
    ("{good} -o /proc/nowhere --engine {engine}", 1, "Cannot write"),
    ("{good} -o {out} --engine {engine} --what", 2, "No such option"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), COMMANDS, ids=[str(case[0]) for case in COMMANDS])
def test_a_bad_command(
    arguments: str, code: int, message: str, tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    PIL.Image.fromarray(PHOTO).save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_bytes(b"just words")
    places = {"good": "good.png", "bad": "text.jpg", "empty": "empty", "out": "out", "engine": str(tiny_engine)}
    result = CliRunner().invoke(main, f"detect {arguments.format(**places)}")
    assert result.exit_code == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "out" / "good.edges.png").exists() == arguments.startswith("{good} {bad}")
