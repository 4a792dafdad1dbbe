"""`trace-sdk export --precision`, from a student to an engine of fewer bits."""

import copy
import errno
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, OutputError, ParityError
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.int8 import Quantised
from trace_sdk.export.onnx import export_onnx
from trace_sdk.export.quality import LIMITS as ODS_LIMITS
from trace_sdk.export.quality import drawn_scenes
from trace_sdk.export.verify import CHANGE_LIMIT, Change
from trace_sdk.student.model import Student


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_int8_by_command(
    student: Student,
    traced: onnx.ModelProto,
    engine: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trace_sdk.export.onnx._to_onnx", lambda *_: copy.deepcopy(traced))
    student.save(tmp_path / "student", {})
    out = tmp_path / "tiny8.onnx"
    result = run(
        "export", tmp_path / "student", "-o", out, "--precision", "int8", "--calibrate", photos, "--default-size", 96
    )
    assert result.exit_code == 0, result.output
    for part in ("8-bit layers", "calibration", "edge pixels", "export took"):
        assert part in result.output
    report = json.loads((tmp_path / "tiny8.onnx.json").read_text())
    assert report["precision"] == "int8" and report["change"]["mean"] <= CHANGE_LIMIT
    assert report["layers"]["calibrated_on"] == 3 and report["layers"]["measured_on"] == 1
    assert report["hardware"]["cpu"] and report["versions"]["onnxruntime"]
    assert out.stat().st_size == report["file_bytes"] < 0.75 * engine.stat().st_size
    types = {node.op_type for node in onnx.load(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types

    small, large = EdgeDetector(out, device="cpu", size=96), EdgeDetector(engine, device="cpu", size=96)
    assert small.info["precision"] == "int8"
    for photo in sorted(photos.rglob("*.*")):
        difference = np.abs(small.run(photo).probability - large.run(photo).probability)
        assert 0 < difference.mean() <= 2 * CHANGE_LIMIT
    assert [edges.probability.shape for edges in small.run_batch([photos / "a.png", photos / "b.jpg"])] == [
        (96, 120)
    ] * 2


def test_16_bit_products_by_command(
    student: Student, traced: onnx.ModelProto, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = partial(EngineGraph, half_weights=True)  # as it was traced
    monkeypatch.setattr("trace_sdk.export.onnx.EngineGraph", lambda student, **_: rounded(student))
    monkeypatch.setattr("trace_sdk.export.onnx._to_onnx", lambda *_: copy.deepcopy(traced))
    student.save(tmp_path / "student", {})
    out = tmp_path / "tiny16.onnx"
    data = tmp_path / "data"
    data.mkdir()
    for sample in drawn_scenes(2, 96):
        Image.fromarray(sample.rgb).save(data / f"{sample.name}.png")
        ids = sample.boundaries[0].cumsum(1) % 2  # any instances do
        Image.fromarray(ids.astype(np.uint8)).save(data / f"{sample.name}.ids.png")
    precise = ("--precision", "fp16-mixed", "--default-size", 96, "--evaluate", data)
    result = run("export", tmp_path / "student", "-o", out, *precise)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "tiny16.onnx.json").read_text())
    assert "16-bit products" in result.output and "ODS" in result.output
    assert report["ods"]["annotated"] and report["ods"]["pictures"] == 2
    assert 0 < report["change"]["mean"] <= 0.002 and report["milliseconds"] > 0
    assert {t.data_type for t in onnx.load(out).graph.initializer} >= {onnx.TensorProto.FLOAT16}
    here, exact = EdgeDetector(out, device="cpu", size=96), EdgeDetector(tmp_path / "student", size=96)
    for photo in sorted(photos.rglob("*.*")):
        assert np.abs(here.run(photo).probability - exact.run(photo).probability).mean() < 0.002
    monkeypatch.setitem(ODS_LIMITS, "fp16-mixed", -1.0)
    refused = run("export", tmp_path / "student", "-o", tmp_path / "no.onnx", *precise)
    assert refused.exit_code == 1 and "ODS falls from" in refused.output
    assert not (tmp_path / "no.onnx").exists()


def test_8_bits_that_are_far_from_torch_are_not_written(
    student: Student, traced: onnx.ModelProto, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_sdk.export.onnx._to_onnx", lambda *_: copy.deepcopy(traced))
    unlike = copy.deepcopy(traced)
    weight = next(t for t in unlike.graph.initializer if t.name.endswith("decoder.residual.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(-3 * onnx.numpy_helper.to_array(weight), weight.name))
    made = Quantised(unlike, "entropy", 3, 1, 9, {}, Change(0, 0, 1))
    monkeypatch.setattr("trace_sdk.export.onnx.quantise", lambda *_, **__: made)
    pictures = sorted(photos.rglob("*.*"))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_onnx(student, tmp_path / "x.onnx", name="x", precision="int8", photos=pictures, default_size=64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--precision", "int8"), "int8 needs photos"),
        (("--calibrate", "."), "only those with 16-bit"),
        (("--calibration", "minmax"), "--calibration is for --precision int8"),
        (("--precision", "int8", "--calibrate", "one"), "at least 2 photos"),
    ],
)
def test_wrong_calibration_is_said_before_tracing(
    arguments: tuple[str, ...],
    fragment: str,
    student: Student,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def traced(*_: object) -> None:
        raise AssertionError("minutes of tracing before the error")

    monkeypatch.setattr("trace_sdk.export.onnx._to_onnx", traced)
    monkeypatch.chdir(tmp_path)
    student.save(tmp_path / "student", {})
    for name in ("a.png", "one/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "a.png").read_bytes())
    result = run("export", "student", "-o", "x.onnx", *arguments)
    assert result.exit_code == 2 and fragment in result.output
    assert not (tmp_path / "x.onnx").exists()


def test_a_folder_that_cannot_be_written_is_named(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(OutputError, match=r"Cannot write .*x\.onnx: Read-only file system"):
        export_onnx(student, tmp_path / "x.onnx", name="x")


@pytest.mark.parametrize("size", [0, -5, 15, 5000])
def test_a_default_size_that_no_engine_could_have_is_refused_at_once(
    student: Student, tmp_path: Path, size: int
) -> None:
    with pytest.raises(ArgumentError, match=rf"default_size={size} must be from 64 to \d+ px"):
        export_onnx(student, tmp_path / "x.onnx", name="x", default_size=size)
    assert not list(tmp_path.iterdir())
