"""A tiny student and its engine, traced once for all tests of exports."""

import copy
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.onnx import _to_onnx, export_onnx
from trace_sdk.export.report import ExportReport
from trace_sdk.student.model import Student


@pytest.fixture(scope="package")
def student(tiny_backbone: PixelBackbone) -> Student:
    """A student whose answers vary over the image."""
    torch.manual_seed(1)
    student = Student(tiny_backbone, threshold=0.3).eval()
    with torch.no_grad():
        for value in student.decoder.parameters():
            value.mul_(1.5)
        torch.nn.init.normal_(student.decoder.residual.weight)
    return student


@pytest.fixture(autouse=True, scope="package")
def few_scenes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trace_sdk.export.quality.DRAWN", 3)
        patch.setattr("trace_sdk.export.quality.DRAWN_SIDE", 96)
        yield


@pytest.fixture(scope="package")
def traced(student: Student) -> onnx.ModelProto:
    """Traced once for the exports with fp16 weights; it takes most of an export's time."""
    return _to_onnx(EngineGraph(student, half_weights=True))


@pytest.fixture(scope="package")
def exported(
    student: Student, traced: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    file = tmp_path_factory.mktemp("engine") / "tiny.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trace_sdk.export.onnx._to_onnx", lambda *_: copy.deepcopy(traced))
        return file, export_onnx(student, file, name="tiny", default_size=96)


@pytest.fixture(scope="package")
def engine(exported: tuple[Path, ExportReport]) -> Path:
    return exported[0]
