"""Windows, as far as Linux can play it: what it has not is not there, and what it refuses is refused."""

from __future__ import annotations

import ast
import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch

from trace_sdk import alone, machine
from trace_sdk.atomic import unfinished_folder, write_text
from trace_sdk.cli.gallery import _link
from trace_sdk.errors import ArgumentError
from trace_sdk.labelling import images
from trace_sdk.labelling.claims import Claims
from trace_sdk.training.loop import train_until
from trace_sdk.training.state import load_state, save_state

ROOT = Path(__file__).parents[1]
fcntl = pytest.importorskip("fcntl", reason="this is Windows itself, or has no locks")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(path, *arguments, **options)

    def synced(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def killed(pid: int, number: int) -> None:
        raise OSError(errno.EINVAL, "0 is Ctrl-C here")

    really_open = os.open
    monkeypatch.setattr("shutil._use_fd_functions", False)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "kill", killed)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(alone, "fcntl", None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])


@pytest.mark.usefixtures("windows")
def test_files_are_written(tmp_path: Path) -> None:
    """Neither could a folder be synced, nor a file that was opened for reading: nothing at all was written."""
    write_text(tmp_path / "a.txt", "±")
    write_text(tmp_path / "a.txt", "×")
    assert (tmp_path / "a.txt").read_text("utf-8") == "×"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.usefixtures("windows")
def test_without_locks_others_work_stays(tmp_path: Path) -> None:
    """Where nobody can say who works in a folder, an export removed that of another under its hands."""
    with unfinished_folder(tmp_path / "a.onnx") as theirs, unfinished_folder(tmp_path / "a.onnx") as own:
        assert theirs.is_dir() and own.is_dir() and own != theirs


@pytest.mark.usefixtures("windows")
def test_claims_ask_no_process(tmp_path: Path) -> None:
    """Signal 0 is Ctrl-C there."""
    with Claims(tmp_path) as mine:
        assert mine.take("a")
        claim = json.loads((tmp_path / "a.claim").read_bytes())
        (tmp_path / "a.claim").write_text(json.dumps({**claim, "pid": claim["pid"] + 1}), "utf-8")
        with Claims(tmp_path) as other:
            assert not other.take("a")


@pytest.mark.usefixtures("windows")
def test_processes_that_prepare_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Leave --workers out"):
        train_until(1, None, tmp_path / "out", 1, lambda *_: None, workers=2)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no module `resource`, whose import ended the benchmark."""

    class Kernel32:
        def __init__(self, name: str) -> None:
            assert name == "kernel32"

        def K32GetProcessMemoryInfo(self, process: Any, counters: Any, size: int) -> int:
            assert process.value == 2**64 - 1 and size == 72
            ctypes.memmove(ctypes.addressof(counters._obj) + 8, (5 << 30).to_bytes(8, "little"), 8)
            return 1

    def no_such_file(file: Path, *_: Any) -> str:
        raise FileNotFoundError(file)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", Kernel32, raising=False)
    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory() == 5 << 30


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_state_that_was_read_is_not_held(tmp_path: Path) -> None:
    """It stayed mapped, and a mapped file cannot be replaced there: a run that went on could not be saved."""
    file = tmp_path / "state.safetensors"
    save_state(file, {"a": torch.ones(100, 100)}, 1, {})
    tensors, _, _ = load_state(file)
    assert str(file) not in Path("/proc/self/maps").read_text("utf-8")
    assert tensors["a"].sum() == 10_000


class Local(PureWindowsPath):
    def absolute(self) -> Local:
        return Local("D:/lists") / self


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (r"in\a.png", "in/a.png"),
        (r"C:\photos\a.png", "photos/a.png"),
        (r"\photos\a.png", "photos/a.png"),
        (r"..\more\a.png", "more/a.png"),
    ],
)
def test_labels_of_listed_photos_stay_in_their_folder(given: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of C:/photos were written there, beside the photos."""
    monkeypatch.setattr(images, "Path", Local)
    assert images._name(given, Local(".")) == name  # type: ignore[arg-type]


def test_links_of_a_page_are_urls() -> None:
    assert _link(PureWindowsPath(r"pictures\a b.jpg")) == "pictures/a%20b.jpg"


@pytest.mark.parametrize("arguments", [["--help"], ["label", "--help"], ["detect", "cars.jpg", "-o", "out"]])
def test_what_a_pipe_cannot_take_is_replaced(arguments: list[str], tmp_path: Path) -> None:
    """→ and μ are not in the encoding of Western Windows: commands ended with a traceback."""
    shutil.copy(ROOT / "examples/photos/cars.jpg", tmp_path)
    command = [sys.executable, "-c", "from trace_sdk.cli import main; main()", *arguments]
    western = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, env=western, capture_output=True, check=False)
    assert done.returncode == 0 and b"?" in done.stdout and b"Traceback" not in done.stderr


def test_a_list_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    """Editors there write one, and the first photo was not found."""
    (tmp_path / "list.txt").write_text("ä.png\n", "utf-8-sig")
    assert [image.name for image in images.find_images(tmp_path / "list.txt")] == ["ä.png"]


@pytest.mark.parametrize("folder", ["trace_sdk", "export", "kernels", "recipes"])
def test_text_is_read_and_written_as_utf_8(folder: str) -> None:
    """Without `encoding` it is what the machine is set to: there, seldom UTF-8."""
    wrong = []
    for file in (ROOT / folder).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(call, ast.Call) and _is_text(call) and not _names_encoding(call):
                wrong.append(f"{file}:{call.lineno}")
    assert not wrong


def _is_text(call: ast.Call) -> bool:
    """read_text(…), or file.open(…) in a mode without b; the functions of trace_sdk.atomic write bytes."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "open"
    name = getattr(call.func, "attr", "")
    if name == "open" and all(isinstance(word, ast.Constant) for word in call.args):
        return not any("b" in str(word.value) for word in call.args)  # type: ignore[attr-defined]
    return name in ("read_text", "write_text")


def _names_encoding(call: ast.Call) -> bool:
    return any(word.arg == "encoding" for word in call.keywords) or (
        getattr(call.func, "attr", "") == "read_text" and bool(call.args)
    )
