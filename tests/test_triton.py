"""The model repository as files; test_triton_server.py asks a real server."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.plan import Built, pack
from trace_sdk.errors import ArgumentError, EngineError, OutputError
from trace_sdk.serving import triton
from trace_sdk.serving.triton import write_repository

MakeEngine = Callable[..., bytes]


def parameters(text: str) -> dict[str, str]:
    return dict(re.findall(r'parameters \{ key: "(\w+)", value: \{ string_value: "([^"]*)" \} \}', text))


def test_the_repository_holds_the_sealed_engine_and_its_configuration(tiny_engine: Path, tmp_path: Path) -> None:
    model = write_repository(tiny_engine, tmp_path / "models", max_batch=4)
    assert model == tmp_path / "models/tiny"
    assert sorted(p.relative_to(model).as_posix() for p in model.rglob("*")) == ["1", "1/model.onnx", "config.pbtxt"]
    served = EdgeDetector(model / "1/model.onnx")
    assert served.manifest.input == "any size"
    text = (model / "config.pbtxt").read_text()
    for line in ('name: "tiny"', 'backend: "onnxruntime"', "max_batch_size: 4", "dynamic_batching {"):
        assert line in text.splitlines()
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert parameters(text) == {
        "input": "any size", "multiple_of": "8", "min_size": "16", "max_size": "1024", "default_size": "128",
        "buckets": "",
        "threshold": "0.4", "sha256": served.info["engine_sha256"],
    }  # fmt: skip
    assert "model_warmup" not in text
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"], "something was left behind"


def test_the_servers_answer_may_be_bytes(tiny_engine: Path, tmp_path: Path) -> None:
    model = write_repository(tiny_engine, tmp_path, output="uint8")
    assert "TYPE_UINT8, dims: [-1, -1] }" in (model / "config.pbtxt").read_text()
    again = write_repository(model / "1/model.onnx", tmp_path / "again")
    with pytest.raises(ArgumentError, match="answers in uint8, not float32"):
        write_repository(model / "1/model.onnx", tmp_path / "third", output="float32")
    assert (again / "1/model.onnx").read_bytes() == (model / "1/model.onnx").read_bytes(), "scaling is in it already"


def test_each_bucket_shape_is_warmed(tiny_engine: Path, tmp_path: Path) -> None:
    model = write_repository(tiny_engine, tmp_path, buckets=[64, 96, 128])
    assert (model / "1/model.onnx").read_bytes() == tiny_engine.read_bytes()
    text = (model / "config.pbtxt").read_text()
    warmed = re.findall(r'model_warmup.*name: "(\d+)x(\d+)".*dims: \[(\d+), (\d+), 3\]', text)
    assert all(shape[:2] == shape[2:] for shape in warmed)
    expected = {(64, 128), (96, 128), (128, 128), (128, 64), (128, 96)}
    assert {(int(height), int(width)) for height, width, *_ in warmed} == expected and len(warmed) == 5
    assert expected == set(EdgeDetector(tiny_engine, buckets=[64, 96, 128]).bucket_shapes())
    assert parameters(text)["buckets"] == "64,96,128"


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"max_batch": 0}, ArgumentError, "max_batch=0"),
        ({}, {"buckets": [60]}, ArgumentError, "multiples of 8"),
        ({}, {"output": "int8", "encoded": True}, ArgumentError, "output='int8' is not one of"),
        ({}, {"buckets": [64], "output": "uint8"}, ArgumentError, "leave buckets out"),
        ({"name": "../up"}, {}, ArgumentError, "cannot name a model"),
        ({"name": 'a" b'}, {}, ArgumentError, "cannot name a model"),
    ],
)
def test_bad_requests(
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    (tmp_path / "e.onnx").write_bytes(make_engine(**changes))
    with pytest.raises(error, match=message):
        write_repository(tmp_path / "e.onnx", tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_nothing_is_overwritten_or_left_half_written(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(tiny_engine, tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        write_repository(tiny_engine, tmp_path / "a")

    def full(*_: object) -> None:
        raise OutputError("disk full")

    monkeypatch.setattr(triton, "write_bytes", full)
    with pytest.raises(OutputError, match="disk full"):
        write_repository(tiny_engine, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
    with pytest.raises(EngineError):
        write_repository(tmp_path / "missing.onnx", tmp_path / "b")


def test_a_folder_that_cannot_be_had_is_named(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/models"):
        with pytest.raises(OutputError, match=r"Cannot write .*file is a file\. Choose a folder"):
            write_repository(tiny_engine, folder)

    def read_only(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(OutputError, match=r"models.*: Read-only file system"):
        write_repository(tiny_engine, tmp_path / "models", buckets=[64])


@pytest.mark.parametrize("buckets", [None, [64, 96]])
def test_models_that_take_files_come_with_the_engine(
    tiny_engine: Path, tmp_path: Path, buckets: list[int] | None
) -> None:
    ensemble = write_repository(tiny_engine, tmp_path, buckets=buckets, encoded=True)
    assert ensemble == tmp_path / "tiny-photo"
    steps = re.findall('model_name: "([^"]+)"', (ensemble / "config.pbtxt").read_text())
    assert steps == ["tiny-decode", "tiny", *(["tiny-restore"] if buckets else [])]
    assert {path.name for path in tmp_path.iterdir()} == {*steps, "tiny-photo"}
    decode = parameters((tmp_path / "tiny-decode/config.pbtxt").read_text())
    # tiny scales to 128 by default, which is more than the largest bucket
    assert decode == ({"size": "96", "buckets": "64,96"} if buckets else {"size": "128", "buckets": ""})
    for folder in ("tiny", "tiny-decode"):
        shutil.rmtree(tmp_path / folder)
    with pytest.raises(OutputError, match="tiny-photo exists already"):
        write_repository(tiny_engine, tmp_path, encoded=True)
    assert not (tmp_path / "tiny").exists()


@pytest.fixture
def plan(tiny_engine: Path, tmp_path: Path) -> Callable[[str], Path]:
    manifest = Manifest.from_metadata(read_metadata(tiny_engine.read_bytes(), "tiny"), "tiny")

    def make(runtime: str) -> Path:
        profile = {"max": [4, 1024, 1024, 3]}
        file = tmp_path / f"{runtime}.engine"
        file.write_bytes(
            pack(manifest, Built(runtime, "10.9.0", "NVIDIA L4 (8.9)", "fp16", profile, "ab" * 32), b"PLAN")
        )
        return file

    return make


def test_a_plan_goes_to_the_tensorrt_backend(plan: Callable[[str], Path], tmp_path: Path) -> None:
    model = write_repository(plan("tensorrt"), tmp_path / "models", max_batch=4, buckets=[64, 128])
    assert sorted(p.relative_to(model).as_posix() for p in model.rglob("*")) == ["1", "1/model.plan", "config.pbtxt"]
    assert (model / "1/model.plan").read_bytes() == b"PLAN"
    text = (model / "config.pbtxt").read_text()
    lines = text.splitlines()
    assert 'backend: "tensorrt"' in lines and "instance_group [{ count: 1, kind: KIND_GPU }]" in lines
    assert len(re.findall(r"graph_spec \{ batch_size: 1", text)) == len(re.findall("model_warmup", text)) == 3
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert parameters(text)["gpu"] == "NVIDIA L4 (8.9)" and parameters(text)["tensorrt"] == "10.9.0"


@pytest.mark.parametrize(
    ("runtime", "options", "error", "message"),
    [
        (
            "tensorrt-rtx",
            {"max_batch": 4, "buckets": [64]},
            EngineError,
            "was built for tensorrt-rtx; Triton's backend",
        ),
        ("tensorrt", {"max_batch": 4}, ArgumentError, "give --buckets"),
        ("tensorrt", {"max_batch": 8, "buckets": [64]}, ArgumentError, "built for at most 4"),
    ],
)
def test_plans_that_triton_cannot_run(
    runtime: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    plan: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        write_repository(plan(runtime), tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_command(tiny_engine: Path, tmp_path: Path) -> None:
    arguments = [
        "deploy",
        "triton",
        f"{tmp_path}/models",
        "--engine",
        f"{tiny_engine}",
        "--buckets",
        "64,128",
        "--encoded",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and f"tritonserver --model-repository={tmp_path}/models" in done.output
    assert "differ" not in done.output
    smaller = CliRunner().invoke(
        main, ["deploy", "triton", f"{tmp_path}/s", "--engine", f"{tiny_engine}", "--buckets", "64"]
    )
    assert smaller.exit_code == 0 and "Add a bucket of 128 for the same" in smaller.output
    assert (tmp_path / "models/tiny-photo").is_dir()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "exists already" in again.stderr and "Traceback" not in again.output
    assert "Examples:" in CliRunner().invoke(main, ["deploy", "triton", "--help"]).stdout
    assert CliRunner().invoke(main, ["deploy", "triton", f"{tmp_path}/x", "--buckets", "a"]).exit_code == 2


def test_with_the_readmes_buckets_the_network_sees_photos_at_its_own_size(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    options = re.findall(r"trace-sdk deploy triton models/ (.*)", readme)[0].split()
    done = CliRunner().invoke(main, ["deploy", "triton", f"{tmp_path}", *options])
    assert "--buckets" in options and done.exit_code == 0 and "differ" not in done.output
