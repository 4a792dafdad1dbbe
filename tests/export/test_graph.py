"""A student as one ONNX file: it answers as in torch, and says where it comes from."""

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import trace_sdk
from trace_sdk import EdgeDetector
from trace_sdk.engines import open_engine
from trace_sdk.errors import ArgumentError, ParityError
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.onnx import export_onnx
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.report import ExportReport
from trace_sdk.export.verify import verify
from trace_sdk.student.model import Student


def test_engine_answers_like_torch_at_the_input_size(engine: Path, student: Student, photos: Path) -> None:
    with Image.open(photos / "a.png") as photo:
        pixels = np.asarray(photo.convert("RGB").resize((96, 80)))
    edges = EdgeDetector(engine, device="cpu").run(pixels)
    assert edges.probability.shape == (80, 96)
    with torch.inference_mode():
        expected = EngineGraph(student, half_weights=True)(torch.from_numpy(pixels)[None])[0].numpy()
    np.testing.assert_allclose(edges.probability, expected, atol=1e-4)
    assert expected.std() > 0.005, "the comparison would not see a wrong engine"


def test_fp16_weights_halve_the_file_and_hardly_move_the_answer(
    engine: Path, student: Student, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_onnx(student, tmp_path / "full.onnx", name="full", precision="fp32")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "noise to whoever exports"
    assert engine.stat().st_size < 0.65 * (tmp_path / "full.onnx").stat().st_size
    half, full = (
        EdgeDetector(file, device="cpu", size=96).run(photos / "a.png").probability
        for file in (engine, tmp_path / "full.onnx")
    )
    assert np.abs(half - full).max() < 0.02


def test_no_cosine_of_float64(engine: Path) -> None:
    """onnxruntime has had it since 1.29, and the last for Macs with Intel is 1.23: trace-small did not open there."""
    for file in (engine, *(Path(trace_sdk.__file__).parent / "engines/bundled").glob("*.onnx")):
        graph = onnx.load(file).graph
        double = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE}
        assert "nano" in file.name or any(node.op_type == "Sin" for node in graph.node)
        assert not [node.name for node in graph.node if node.op_type == "Cos" and node.input[0] in double]


def test_only_large_weights_are_stored_in_fp16() -> None:
    from onnx import TensorProto, helper, numpy_helper

    large, small = np.ones((20, 20), np.float32), np.ones(3, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["large"], ["y"])], "g", [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [20, 20])],
        [numpy_helper.from_array(large, "large"), numpy_helper.from_array(small, "small")],
    )  # fmt: skip
    model = helper.make_model(graph)
    assert store_weights_in_fp16(model) == 1
    onnx.checker.check_model(model)
    assert {t.name: t.data_type for t in model.graph.initializer} == {
        "large.fp16": TensorProto.FLOAT16,
        "small": TensorProto.FLOAT,
    }


def test_folding_timestep_zero_changes_nothing_and_drops_weights(student: Student) -> None:
    graph = EngineGraph(student, half_weights=False)
    images = torch.randint(0, 256, (2, 64, 72, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = student.logits(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        torch.testing.assert_close(graph(images), logits.sigmoid(), atol=1e-6, rtol=1e-5)
    count = lambda model: sum(value.numel() for value in model.parameters())  # noqa: E731
    assert count(graph) < count(student)
    assert not any("norm.linear" in name for name, _ in graph.named_parameters() if "single" in name)


def test_manifest_tells_where_the_engine_comes_from(engine: Path) -> None:
    manifest = open_engine(engine, "cpu").manifest
    assert (manifest.name, manifest.backbone, manifest.precision) == ("tiny", "pixel-flux", "fp16")
    assert manifest.threshold == 0.3 and manifest.default_size == 96
    assert len(manifest.backbone_sha256) == 64 and set(manifest.producers) == {"torch", "onnx", "onnxruntime"}
    assert max(manifest.parity.values()) <= 1e-4


def test_report_of_an_export(exported: tuple[Path, ExportReport], student: Student) -> None:
    engine, report = exported
    model = onnx.load(engine)
    assert report.file_bytes == engine.stat().st_size and report.nodes == len(model.graph.node)
    assert report.file_bytes < 0.65 * report.float_bytes
    assert report.sha256 == open_engine(engine, "cpu").sha256
    assert set(report.parity) == {"1×64×64", "1×128×72", "3×96×160"} and max(report.parity.values()) <= 1e-4
    assert report.change is not None and 0 < report.change.mean < 0.01 and report.change.edges > 0.9
    assert report.ods is not None and report.ods.kept and report.ods.pictures == 3 and 0 < report.ods.before < 1
    assert report.layers is None and report.milliseconds > 0 and report.seconds > 0


def test_wrong_graph_is_refused(engine: Path, student: Student) -> None:
    other = EngineGraph(student, half_weights=True)
    with torch.no_grad():
        other.student.decoder.residual.bias = torch.nn.Parameter(other.student.decoder.residual.bias + 0.1)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        verify(engine.read_bytes(), other)


def test_precision_must_be_known(student: Student, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="precision"):
        export_onnx(student, tmp_path / "x.onnx", name="x", precision="int3")
