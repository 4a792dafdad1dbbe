"""One process at a time works in a folder, and what a killed one left there is free."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_sdk.alone import alone
from trace_sdk.atomic import unfinished_folder
from trace_sdk.errors import OutputError

HOLD = """
import sys
from pathlib import Path
from trace_sdk.atomic import unfinished_folder
with unfinished_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process at work on tmp_path/engine.onnx, and the folder it works in."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "engine.onnx")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_two_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(OutputError, match=r"Another process is writing to .* \(-o\)"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_work_of_a_living_process_stays(other: tuple[subprocess.Popen[str], Path]) -> None:
    """Two exports to one file removed each other's folder."""
    _, folder = other
    with unfinished_folder(folder.parent / "engine.onnx") as own:
        assert own != folder and (folder / "half").exists()


def test_work_of_a_killed_process_is_removed(other: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = other
    process.kill()
    process.wait()
    assert (folder / "half").exists()
    with unfinished_folder(folder.parent / "engine.onnx"):
        assert not folder.exists()
