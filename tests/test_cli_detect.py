from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from trace_sdk.cli import console, main

PHOTO = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
Detect = Callable[..., Result]


@pytest.fixture
def detect(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Detect:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["detect", *arguments, "-o", "out", "--engine", str(tiny_engine)])

    return run


def photos(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.convert("RGB").save(path, "PNG")


def written() -> list[str]:
    return sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file())


def test_one_photo(detect: Detect) -> None:
    photos("street.png")
    result = detect("street.png")
    assert result.exit_code == 0
    assert written() == ["street.edges.png"]
    picture = PIL.Image.open("out/street.edges.png")
    assert picture.size == PHOTO.size and picture.mode == "L"
    assert json.loads(picture.info["trace_sdk"])["engine"] == "tiny"
    (line,) = result.stdout.splitlines()
    assert line.startswith("1 photo → out: median ") and line.endswith(" s (tiny on cpu, size 128)")


def test_verbose_lists_what_ran(detect: Detect) -> None:
    photos("a.png", "b.png")
    result = detect("a.png", "b.png", "--verbose", "--buckets", "96,128")
    assert result.exit_code == 0
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines()[:-1])
    assert said["provider"] == "CPUExecutionProvider" and said["precision"] == "fp32" and int(said["threads"]) >= 1
    assert said["buckets"] == "96, 128" and said["device_reason"].startswith("auto: ")
    for stage in ("decode", "resize", "network", "resize_back", "total"):
        assert re.fullmatch(r"median \d+\.\d ms, slowest \d+\.\d ms", said[stage])
    assert "buckets: none" in detect("a.png", "--verbose").stdout
    for wrong, code in (("96,big", 2), ("100", 2), ("", 2)):
        assert detect("a.png", "--buckets", wrong).exit_code == code


def test_folders_keep_their_sub_folders(detect: Detect) -> None:
    photos("in/b.JPG", "in/a.webp", "in/sub/deep/c.png", "in/d.heic", "in/.hidden.png", "in/.cache/x.png")
    Path("in/notes.txt").write_text("no photo")
    assert detect("in", "--overlay").exit_code == 0
    assert written() == [
        "a.edges.png", "a.overlay.jpg", "b.edges.png", "b.overlay.jpg", "d.edges.png", "d.overlay.jpg",
        "sub/deep/c.edges.png", "sub/deep/c.overlay.jpg",
    ]  # fmt: skip
    assert PIL.Image.open("out/a.overlay.jpg").size == PHOTO.size


def test_patterns(detect: Detect) -> None:
    photos("in/a.png", "in/sub/b.png", "in/sub/c.jpg")
    assert detect("in/**/*.png").exit_code == 0
    assert written() == ["a.edges.png", "b.edges.png"]
    photos("[1].png")
    assert detect("[1].png").exit_code == 0
    assert "[1].edges.png" in written()


def test_a_named_file_is_tried_whatever_its_suffix(detect: Detect) -> None:
    photos("picture.dat", "picture2")
    assert detect("picture.dat", "picture2").exit_code == 0
    assert written() == ["picture.edges.png", "picture2.edges.png"]


def test_results_never_collide(detect: Detect) -> None:
    photos("in/a.jpg", "in/a.png", "in/A.webp", "in/b.png", "other/b.png", "other/a.jpg")
    assert detect("in", "other/b.png", "other/a.jpg").exit_code == 0
    assert written() == [
        "A.webp.edges.png", "a.jpg-2.edges.png", "a.jpg.edges.png", "a.png.edges.png",
        "b.png-2.edges.png", "b.png.edges.png",
    ]  # fmt: skip


def test_a_photo_given_twice_is_done_once(detect: Detect) -> None:
    photos("in/a.png")
    assert detect("in", "in/a.png", "in/*.png").exit_code == 0
    assert written() == ["a.edges.png"]


def test_earlier_results_are_no_photos(detect: Detect) -> None:
    photos("out/a.png")
    for _ in range(2):
        assert detect("out", "--overlay").exit_code == 0
    assert written() == ["a.edges.png", "a.overlay.jpg", "a.png"]


@pytest.mark.parametrize(("form", "dtype"), [("npy", np.float32), ("tif", np.float32), ("png", np.uint8)])
def test_formats(detect: Detect, form: str, dtype: type) -> None:
    photos("a.png")
    assert detect("a.png", "--format", form, "--size", "64").exit_code == 0
    path = Path(f"out/a.edges.{form}")
    array = np.load(path) if form == "npy" else np.asarray(PIL.Image.open(path))
    assert array.dtype == dtype and array.shape == (30, 40)


def test_a_bad_file_is_reported_and_the_others_are_done(detect: Detect) -> None:
    photos("a.png", "c.png")
    Path("b.png").write_bytes(b"")
    result = detect("a.png", "b.png", "c.png")
    assert result.exit_code == 1
    assert written() == ["a.edges.png", "c.edges.png"]
    assert "error: b.png: is empty (0 bytes)" in result.stderr
    assert result.stdout.startswith("2 photos → out, 1 failed: ")


def test_a_photo_too_long_for_a_jpeg_is_reported_and_the_others_are_done(detect: Detect) -> None:
    """It ended the run, and the message told to find another folder."""
    Path("in").mkdir()
    PIL.Image.new("L", (65_501, 20)).save("in/a.png")
    photos("in/b.png")
    result = detect("in", "--overlay")
    assert (
        result.exit_code == 1 and "A JPEG has at most 65,500 pixels a side, this picture is 65501x20" in result.stderr
    )
    assert written() == ["a.edges.png", "b.edges.png", "b.overlay.jpg"]


def test_a_name_as_long_as_file_systems_allow(detect: Detect) -> None:
    """The unfinished file's name was longer than the finished one's."""
    name = "\u3042" * 81  # 243 bytes, 253 with .edges.png
    photos(f"in/{name}.png")
    assert detect("in").exit_code == 0 and written() == [f"{name}.edges.png"]


def test_info(tiny_engine: Path) -> None:
    table = CliRunner().invoke(main, ["info", str(tiny_engine)])
    assert table.exit_code == 0 and "tiny (sha256 verified)" in table.stdout
    facts = json.loads(CliRunner().invoke(main, ["info", str(tiny_engine), "--json"]).stdout)
    assert facts["bytes"] == tiny_engine.stat().st_size
    assert facts["sha256"].encode() in tiny_engine.read_bytes()
    assert facts["name"] == "tiny" and facts["device"] == "cpu" and facts["multiple_of"] == 8
    missing = CliRunner().invoke(main, ["info", "missing.onnx"])
    assert missing.exit_code == 1 and missing.stderr.startswith("error: missing.onnx: no such engine file")


def test_help_teaches() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    for verb in ("detect", "info", "pretrain", "label", "distill", "export", "benchmark", "evaluate"):
        assert f"  {verb} " in text
    text = CliRunner().invoke(main, ["detect", "--help"]).stdout
    assert "Examples:" in text and "Exit code:" in text and "130" in text
    assert CliRunner().invoke(main, ["nonsense"]).exit_code == 2
    assert CliRunner().invoke(main, ["--version"]).stdout == "trace-sdk, version 0.1.0\n"


def test_a_missing_extra_names_the_install_line(capsys: pytest.CaptureFixture[str]) -> None:
    from click.exceptions import Exit

    for name, extra in [("torch.nn", "train"), ("skimage", "evaluate")]:
        with pytest.raises(Exit) as caught, console.report_errors():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        assert caught.value.exit_code == 1
        assert f'pip install "trace-sdk[{extra}]"' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), console.report_errors():
        raise ModuleNotFoundError("a fault of ours", name="trace_sdk.nothing")


def test_progress_in_a_log_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("label", total=3, done=1) as advance:
        advance(note="a")
        advance(note="b")
    assert capsys.readouterr().err == "label: 3/3 b\n"


def test_ctrl_c_leaves_whole_files_only(tiny_engine: Path, tmp_path: Path) -> None:
    big = PHOTO.resize((1500, 1500))
    (tmp_path / "in").mkdir()
    for number in range(40):
        big.save(tmp_path / "in" / f"{number:02}.jpg")
    command = [sys.executable, "-c", "from trace_sdk.cli import main; main()", "detect", "in", "-o", "out"]
    process = subprocess.Popen(
        [*command, "--overlay", "--size", "1500", "--engine", str(tiny_engine)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run by nohup ignores it
    )  # fmt: skip
    while not list(tmp_path.glob("out/*.overlay.jpg")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - stopped <= 2
    assert process.returncode == 130
    assert "of 40 photos done" in stderr and "interrupted. To go on, run: " in stderr
    assert "Traceback" not in stderr
    files = list((tmp_path / "out").iterdir())
    assert 1 <= len(files) < 80
    for path in files:
        PIL.Image.open(path).load()


def test_a_closed_pipe_is_quiet() -> None:
    code = "from trace_sdk.cli import main; main(['detect', '--help'])"
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in process.stderr


def test_one_photo_through_a_pipe(tiny_engine: Path, tmp_path: Path) -> None:
    def detect(*arguments: str, photo: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        code = "from trace_sdk.cli import main; main(prog_name='trace-sdk')"
        command = [sys.executable, "-c", code, "detect", *arguments, "--engine", str(tiny_engine)]
        return subprocess.run(command, input=photo, capture_output=True, cwd=tmp_path)

    PHOTO.save(tmp_path / "street.png")
    photo = (tmp_path / "street.png").read_bytes()
    assert detect("street.png", "-o", "out").returncode == 0
    expected = (tmp_path / "out" / "street.edges.png").read_bytes()
    for piped in (detect("-", "-o", "-", photo=photo), detect("street.png", "-o", "-")):
        assert piped.returncode == 0 and piped.stdout == expected and piped.stderr == b""
    both = detect("-", "street.png", "-o", "both", "--overlay", photo=photo)
    assert both.returncode == 0 and (tmp_path / "both" / "stdin.edges.png").read_bytes() == expected
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "stdin.edges.png", "stdin.overlay.jpg", "street.edges.png", "street.overlay.jpg",
    ]  # fmt: skip
    empty = detect("-", "-o", "-")
    assert empty.returncode == 1 and empty.stdout == b"" and b"error: <stdin>: is empty (0 bytes)." in empty.stderr
    for wrong in (["-", "street.png"], ["street.png", "--overlay"], ["street.png", "--format", "npy"], ["clip.mp4"]):
        refused = detect(*wrong, "-o", "-", photo=photo)
        assert refused.returncode == 2 and b"the edges of one photo as a PNG" in refused.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_standard_output_is_one_line(tiny_engine: Path, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "street.png")
    code = "from trace_sdk.cli import main; main(prog_name='trace-sdk')"
    for arguments in (["detect", "street.png", "-o", "-", "--engine", str(tiny_engine)], ["info"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "error: The standard output cannot be written (No space left on device). Make room, or send it elsewhere."
        ]
