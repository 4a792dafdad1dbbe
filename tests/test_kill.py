"""kill -9 while a file is being written: the old one is untouched, a later run is not disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines.plan import unpack
from trace_sdk.engines.tensorrt import load_package
from trace_sdk.errors import MissingExtraError

# All is written, nothing is on the disk for sure yet: the process says so, and waits for its end.
_CHILD = """
import os, sys, time
def fsync(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = fsync
{}
"""
_COMMAND = "from trace_sdk.cli import main; main(sys.argv[1:])"
_CACHE = """
from pathlib import Path
from trace_sdk.export.tensorrt import build_once
build_once(Path(sys.argv[1]).read_bytes(), "tiny.onnx", "tensorrt-rtx")
"""


def killed(program: str, *arguments: object) -> None:
    """Run it until it writes its first file, and kill it there."""
    command = [sys.executable, "-c", _CHILD.format(program), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        said = child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        assert said == "writing\n", said + child.stderr.read()
    assert child.returncode == -signal.SIGKILL


def need_tensorrt_rtx() -> None:
    try:
        load_package("tensorrt-rtx")
    except MissingExtraError as error:
        pytest.skip(str(error))


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments], standalone_mode=False)


def test_an_export(tiny_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "any.onnx"
    arguments = ("export", tiny_engine, "-o", out, "--any-size")
    killed(_COMMAND, *arguments)
    assert not out.exists()
    out.write_bytes(b"older")
    killed(_COMMAND, *arguments)
    assert out.read_bytes() == b"older"
    run(*arguments)
    assert EdgeDetector(out).manifest.input == "any size"


def test_a_plan(tiny_engine: Path, tmp_path: Path) -> None:
    need_tensorrt_rtx()
    out = tmp_path / "tiny.engine"
    arguments = ("export", tiny_engine, "-o", out, "--runtime", "tensorrt-rtx")
    killed(_COMMAND, *arguments)
    assert not out.exists()
    run(*arguments)
    assert unpack(out.read_bytes(), "tiny.engine")[0].name == "tiny"


def test_the_cache_of_plans(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tensorrt_rtx()
    from trace_sdk.export import tensorrt

    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
    killed(_CACHE, tiny_engine)
    (left,) = (tmp_path / "cache").iterdir()
    assert left.suffix == ".tmp"
    engine = tiny_engine.read_bytes()
    first, why = tensorrt.build_once(engine, "tiny.onnx", "tensorrt-rtx")
    assert why == "built" and left.exists(), "it may belong to a process that is still writing"
    assert tensorrt.build_once(engine, "tiny.onnx", "tensorrt-rtx") == (first, "from the cache")
    os.utime(left, (0, 0))
    next(file for file in left.parent.iterdir() if file != left).write_bytes(b"damaged")
    assert tensorrt.build_once(engine, "tiny.onnx", "tensorrt-rtx")[1].startswith("built again")
    assert not left.exists()


def test_a_model_repository(tiny_engine: Path, tmp_path: Path) -> None:
    arguments = ("deploy", "triton", tmp_path / "models", "--engine", tiny_engine, "--buckets", "64,128")
    killed(_COMMAND, *arguments)
    assert not (tmp_path / "models/tiny").exists()
    run(*arguments)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"], (
        "a server would load whatever lies there"
    )
    assert EdgeDetector(tmp_path / "models/tiny/1/model.onnx").manifest.name == "tiny"
