"""Video: frames in and out, and numbers that stay with their instance."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from trace_sdk.cli import main
from trace_sdk.cli.detect import camera_number
from trace_sdk.video import Clip, _writers, open_video

av = pytest.importorskip("av", reason="needs trace-sdk[video]")
pytest.importorskip("trackers", reason="needs trace-sdk[video]")

FRAMES, RATE = 12, 10


def record(path: Path, frames: list[Any]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A bright square that moves right and a dark one that moves left, past each other in two rows."""
    frames = []
    for t in range(FRAMES):
        frame = np.full((96, 128, 3), 110, np.uint8)
        frame[8:40, 8 + 6 * t : 40 + 6 * t] = 250
        frame[56:88, 88 - 6 * t : 120 - 6 * t] = 0
        frames.append(frame)
    return record(tmp_path / "clip.mp4", frames)


def detect(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["detect", *map(str, arguments)])


def test_numbers_stay_with_their_instance(clip: Path, tiny_engine: Path, tmp_path: Path) -> None:
    result = detect(clip, "-o", tmp_path / "out", "--engine", tiny_engine, "--overlay")
    assert result.exit_code == 0, result.output
    assert f"{FRAMES} frames of 10/s" in result.stdout and "frames/s, total" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/clip.frames.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES)) and lines[5]["time"] == pytest.approx(0.5)
    for row, way in ((24, 6), (72, -6)):
        start = 24 if way > 0 else 104
        numbers = []
        for t, line in enumerate(lines):
            centre = start + way * t
            (here,) = [
                one["id"] for one in line["instances"]
                if one["area"] < 2500 and one["bbox"][0] < centre < one["bbox"][0] + one["bbox"][2]
                and one["bbox"][1] < row < one["bbox"][1] + one["bbox"][3]
            ]  # fmt: skip
            numbers.append(here)
        # A tracker numbers what it sees for the second time.
        assert numbers[0] is None and numbers[1] is not None and len(set(numbers[1:])) == 1
    assert len({one["id"] for one in lines[6]["instances"]}) == len(lines[6]["instances"]) == 3


def test_videos_have_the_frames_and_size_of_the_input(clip: Path, tiny_engine: Path, tmp_path: Path) -> None:
    assert detect(clip, "-o", tmp_path / "out", "--engine", tiny_engine, "--overlay").exit_code == 0
    for name in ("clip.edges.mp4", "clip.overlay.mp4"):
        with av.open(str(tmp_path / "out" / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert float(container.streams.video[0].average_rate) == RATE
        assert len(frames) == FRAMES and frames[0].shape == (96, 128, 3)
        if "edges" in name:
            assert frames[0][24, 8].mean() > 100 and frames[0][48, 64].mean() < 30


def test_odd_sides_are_filled_up(tmp_path: Path) -> None:
    with _writers(av, [str(tmp_path / "odd.mp4")], Clip("odd", Fraction(RATE), iter(()))) as (write,):
        write(np.full((33, 65, 3), 200, np.uint8), 0.0)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (66, 34)


def test_videos_of_one_name_keep_their_own(clip: Path, tiny_engine: Path, tmp_path: Path) -> None:
    """The second took the place of the first without a word; and a pattern found no video."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(clip, tmp_path / folder)
    result = detect(f"{tmp_path}/[xy]/*.mp4", "-o", tmp_path / "out", "--engine", tiny_engine)
    assert result.exit_code == 0, result.output
    names = {f"clip.mp4{number}.{end}" for number in ("", "-2") for end in ("edges.mp4", "frames.jsonl")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_frames_keep_their_times(tiny_engine: Path, tmp_path: Path) -> None:
    """Phones record no fixed rate; numbers of frames by the mean rate were given as times."""
    times = [0, 100, 200, 1000, 1100, 3000]
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, milliseconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert detect(tmp_path / "a.mp4", "-o", tmp_path / "out", "--engine", tiny_engine).exit_code == 0
    lines = (tmp_path / "out/a.frames.jsonl").read_text().splitlines()
    assert [json.loads(line)["time"] * 1000 for line in lines] == times
    with av.open(str(tmp_path / "out/a.edges.mp4")) as container:
        assert [round(frame.time * 1000) for frame in container.decode(video=0)] == times


def test_phone_videos_are_upright(tmp_path: Path) -> None:
    """Phones store frames as the sensor lies and say beside them how to turn: they came out on their side."""
    frame = np.full((48, 64, 3), 30, np.uint8)
    frame[:, :16] = 220  # on the left; upright, after a quarter clockwise, on top
    content = bytearray(record(tmp_path / "a.mp4", [frame] * 3).read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    with open_video(tmp_path / "a.mp4") as turned:
        _, picture = next(turned.frames)
    assert picture.shape == (64, 48, 3) and picture[:12].mean() > 200 and picture[20:].mean() < 50


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50])
def test_a_bad_video_is_named_and_photos_are_still_done(
    tiny_engine: Path, photos: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    result = detect(tmp_path / "bad.mp4", photos / "a.png", "-o", tmp_path / "out", "--engine", tiny_engine)
    assert result.exit_code == 1 and "bad.mp4 cannot be read as a video" in result.stderr
    assert "Traceback" not in result.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.edges.png"}


def test_a_missing_video(tiny_engine: Path, tmp_path: Path) -> None:
    result = detect(tmp_path / "gone.mp4", "-o", tmp_path / "out", "--engine", tiny_engine)
    assert result.exit_code == 1 and "gone.mp4" in result.stderr


def test_no_file_is_left_when_it_is_cut(
    clip: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_sdk.edge_map import EdgeMap

    original, calls = EdgeMap.instances, 0

    def stop(self: EdgeMap, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(EdgeMap, "instances", stop)
    result = detect(clip, "-o", tmp_path / "out", "--engine", tiny_engine)
    assert result.exit_code == 130
    assert list((tmp_path / "out").iterdir()) == []


class FakeCamera:
    """What cv2.VideoCapture is, with five BGR frames; then it is unplugged or interrupted."""

    frames, then, opened = 5, "unplugged", True

    def __init__(self, number: int) -> None:
        self.number, self.seen, self.released = number, 0, False

    def isOpened(self) -> bool:  # as OpenCV spells it
        return self.opened

    def get(self, what: int) -> float:
        return 0.0  # many drivers tell no rate

    def read(self) -> tuple[bool, Any]:
        if self.seen == self.frames:
            if self.then == "interrupted":
                raise KeyboardInterrupt
            return False, None
        self.seen += 1
        frame = np.full((48, 64, 3), 60, np.uint8)
        frame[8:40, 16:48] = (250, 0, 0)  # blue
        return True, frame

    def release(self) -> None:
        FakeCamera.released_number = self.number


@pytest.mark.parametrize("then", ["unplugged", "interrupted"])
def test_a_camera_is_recorded_until_it_ends(
    then: str, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    monkeypatch.setattr(FakeCamera, "then", then)
    result = detect("camera:3", "-o", tmp_path / "out", "--engine", tiny_engine, "--overlay")
    assert result.exit_code == 0, result.output
    assert FakeCamera.released_number == 3 and "frames/s, total" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/camera-3.frames.jsonl").read_text().splitlines()]
    assert 1 <= len(lines) <= 5 and (then == "interrupted" or len(lines) == 5)
    assert lines[0]["time"] == 0 and all(a["time"] <= b["time"] for a, b in itertools.pairwise(lines))
    with av.open(str(tmp_path / "out/camera-3.overlay.mp4")) as container:
        (first, *others) = container.decode(video=0)
        assert len(others) + 1 == len(lines)
    red, _, blue = first.to_ndarray(format="rgb24")[24, 32].astype(int)
    assert blue > red + 100


def test_no_camera(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    monkeypatch.setattr(FakeCamera, "opened", False)
    result = detect("7", "-o", tmp_path / "out", "--engine", tiny_engine)
    assert result.exit_code == 1 and "Camera 7 cannot be opened" in result.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_names_of_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2").mkdir()  # a folder of that name comes first
    names = ("camera:0", "1", "2", "a.mp4", "camera:x", "C:1")
    assert [camera_number(name) for name in names] == [0, 1, None, None, None, None]
