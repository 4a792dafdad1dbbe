"""Students whose weights one ONNX file cannot hold."""

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from trace_sdk import EdgeDetector
from trace_sdk.engines import open_engine
from trace_sdk.errors import EngineError, OutputError
from trace_sdk.export.any_size import take_any_size
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.onnx import TRACED, export_onnx
from trace_sdk.serving.triton import write_repository
from trace_sdk.student.model import Student


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_that_one_file_cannot_hold_lie_beside_it(
    precision: str,
    student: Student,
    traced: onnx.ModelProto,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trace_sdk.export.onnx.ONE_FILE", 200_000)
    if precision == "fp16":  # traced already

        def save(_: object, opset: int, work: Path) -> onnx.ModelProto:
            onnx.save(
                copy.deepcopy(traced), work / TRACED, save_as_external_data=True, location="w", size_threshold=1024
            )
            return onnx.load(work / TRACED, load_external_data=False)

        monkeypatch.setattr("trace_sdk.export.onnx._to_onnx", save)
    file = tmp_path / "large.onnx"
    report = export_onnx(student, file, name="large", precision=precision, default_size=96)
    data = tmp_path / "large.onnx.data"
    assert sorted(tmp_path.iterdir()) == [file, data]
    assert file.stat().st_size < 0.2 * data.stat().st_size
    assert report.file_bytes == file.stat().st_size + data.stat().st_size
    assert data.stat().st_size < 1.2 * report.float_bytes / (1 if precision == "fp32" else 2)
    engine = EdgeDetector(file, device="cpu", size=96)
    assert engine.manifest.data == {
        "file": data.name, "bytes": data.stat().st_size, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()
    }  # fmt: skip
    with Image.open(photos / "a.png") as photo:
        pixels = np.array(photo.convert("RGB").resize((96, 80)))
    with torch.inference_mode():
        expected = EngineGraph(student, half_weights=precision == "fp16")(torch.from_numpy(pixels)[None])[0].numpy()
    np.testing.assert_allclose(engine.run(pixels).probability, expected, atol=1e-4)

    if precision == "fp16":
        full_disk(monkeypatch)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(OutputError, match="No space left"):
            export_onnx(student, file, name="larger", precision=precision, default_size=104)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, "the older engine is whole"
        return
    write_repository(file, tmp_path / "models", buckets=[64, 96])
    assert (tmp_path / "models/large/1/large.onnx.data").read_bytes() == data.read_bytes()
    for make in (lambda: write_repository(file, tmp_path / "other"), lambda: run_any_size(file)):
        with pytest.raises(EngineError, match="needs an engine in one file"):
            make()
    whole = data.read_bytes()
    for content, says in (
        (whole[:-1], "cut short or of another engine"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "sha256 differs"),
        (None, "is missing"),
    ):
        data.unlink()
        if content is not None:
            data.write_bytes(content)
        with pytest.raises(EngineError, match=f"{re.escape(str(data))}.*{says}.*Copy it again"):
            open_engine(file, "cpu")


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room left for an engine's graph."""

    @contextmanager
    def full(path: Path) -> Iterator[IO[bytes]]:
        raise OutputError(f"Cannot write {path}: No space left on device.")
        yield

    monkeypatch.setattr("trace_sdk.export.onnx.write_whole", full)


def run_any_size(file: Path) -> bytes:
    return take_any_size(file.read_bytes(), str(file))


def test_what_large_students_cannot_have_is_said_before_tracing(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_sdk.export.onnx.ONE_FILE", 1000)
    with pytest.raises(EngineError, match="need one file, which holds 2 GB"):
        export_onnx(student, tmp_path / "x.onnx", name="x", any_size=True)
    monkeypatch.setattr(Student, "no_graph", "it goes round in circles")
    with pytest.raises(EngineError, match=r"pixel-flux cannot be exported: it goes round .* in torch"):
        export_onnx(student, tmp_path / "x.onnx", name="x")
    assert not list(tmp_path.iterdir())
