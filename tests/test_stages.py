"""The whole line as a user runs it: pretrain → label → distill → export → info → detect, each a command."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from trace_sdk import EdgeDetector
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.engines import open_engine
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, MissingExtraError, ParityError
from trace_sdk.export.any_size import take_any_size
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.int8 import Quantised
from trace_sdk.export.onnx import TRACED, _to_onnx, export_onnx
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.quality import LIMITS as ODS_LIMITS
from trace_sdk.export.quality import drawn_scenes
from trace_sdk.export.report import ExportReport
from trace_sdk.export.verify import CHANGE_LIMIT, Change, verify
from trace_sdk.serving.triton import write_repository
from trace_sdk.student.model import Student


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def student(tiny_backbone: PixelBackbone) -> Student:
    """A student whose answers vary over the image."""
    torch.manual_seed(1)
    student = Student(tiny_backbone, threshold=0.3).eval()
    with torch.no_grad():
        for value in student.decoder.parameters():
            value.mul_(1.5)
        torch.nn.init.normal_(student.decoder.residual.weight)
    return student


@pytest.fixture(autouse=True, scope="module")
def few_scenes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trace_sdk.export.quality.DRAWN", 3)
        patch.setattr("trace_sdk.export.quality.DRAWN_SIDE", 96)
        yield


@pytest.fixture(scope="module")
def traced(student: Student) -> onnx.ModelProto:
    """Traced once for the exports with fp16 weights; it takes most of an export's time."""
    return _to_onnx(EngineGraph(student, half_weights=True))


@pytest.fixture(scope="module")
def exported(
    student: Student, traced: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    file = tmp_path_factory.mktemp("engine") / "tiny.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trace_sdk.export.onnx._to_onnx", lambda *_: copy.deepcopy(traced))
        return file, export_onnx(student, file, name="tiny", default_size=96)


@pytest.fixture(scope="module")
def engine(exported: tuple[Path, ExportReport]) -> Path:
    return exported[0]


def test_from_photos_to_edges(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    backbone, labels, student = (tmp_path / part for part in ("backbone", "labels", "student"))
    small = ("--size", 64, "--tokens", 128)
    label = ("label", photos, "--backbone", backbone, "-o", labels, "--size", 64, "--stride", 300, "--plot")
    stages = (
        ("pretrain", photos, "-o", backbone, "--layers", 1, "--heads", 1, "--steps", 3, *small),
        label,
        ("distill", photos, "--labels", labels, "--backbone", backbone, "-o", student, "--steps", 2, *small),
        ("export", student, "-o", tmp_path / "mine.onnx", "--default-size", 96),
        ("info", tmp_path / "mine.onnx"),
        ("detect", photos, "-o", tmp_path / "edges", "--engine", tmp_path / "mine.onnx", "--overlay"),
    )
    for stage in stages:
        result = run(*stage)
        assert result.exit_code == 0, f"{stage[0]}: {result.output}"
    assert len(list(labels.rglob("*.npz"))) == len(list(labels.rglob("*.*.png"))) == 4
    assert len(list((tmp_path / "edges").rglob("*.png"))) >= 4
    index = json.loads((student / "student.json").read_text())
    assert index["distilled_steps"] == 2
    again = run(*label)
    assert "0 labelled" in again.output and "4 were there already" in again.output


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("label", "nowhere", "--backbone", "nowhere", "-o", "out"), 1, "No photos in nowhere"),
        (("pretrain", "nowhere", "-o", "out"), 1, "No photos in nowhere"),
        (("distill", "nowhere", "--labels", "l", "--backbone", "b", "-o", "out"), 1, "No photos in nowhere"),
        (("export", "nowhere", "-o", "a.onnx"), 1, "nowhere"),
        (("label", ".", "--backbone", "b", "-o", "out", "--size", "8"), 2, "size must be at least 64"),
        (("label", ".", "--backbone", "b", "-o", "out", "-t", "1.5"), 2, "timesteps must lie"),
        (("pretrain", ".", "-o", "out", "--steps", "0"), 2, "steps must be"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...], code: int, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    result = run(*arguments)
    assert result.exit_code == code
    assert fragment in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_an_error(photos: Path, tmp_path: Path, tiny_backbone: PixelBackbone) -> None:
    tiny_backbone.save(tmp_path / "b")
    result = run("label", photos, "--backbone", tmp_path / "b", "-o", tmp_path / "l", "--device", "cuda")
    assert result.exit_code == 1 and "--device cpu" in result.output
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize("command", ["pretrain", "label", "distill", "export"])
def test_help_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"trace-sdk {command} " in result.output, "no example"


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


def test_folding_timestep_zero_changes_nothing_and_drops_weights(student: Student) -> None:
    graph = EngineGraph(student, half_weights=False)
    images = torch.randint(0, 256, (2, 64, 72, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = student.logits(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        torch.testing.assert_close(graph(images), logits.sigmoid(), atol=1e-6, rtol=1e-5)
    count = lambda model: sum(value.numel() for value in model.parameters())  # noqa: E731
    assert count(graph) < count(student)
    assert not any("norm.linear" in name for name, _ in graph.named_parameters() if "single" in name)


@pytest.mark.parametrize("runtime", ["auto", "torch.compile"])
def test_a_student_runs_in_torch_as_its_engine_does(
    runtime: str, engine: Path, student: Student, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    # The compiler itself would take a minute and a C++ compiler; it is torch's to test.
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    rounded = copy.deepcopy(student)
    with torch.no_grad():
        for value in rounded.parameters():
            value.copy_(value.half().float())
    rounded.save(tmp_path / "mine", {})
    in_torch = EdgeDetector(tmp_path / "mine", device="cpu", size=96, runtime=runtime)
    in_onnx = EdgeDetector(engine, device="cpu", size=96)
    for photo in (photos / "a.png", photos / "b.jpg"):
        edges, expected = in_torch.run(photo), in_onnx.run(photo)
        np.testing.assert_allclose(edges.probability, expected.probability, atol=1e-4)
    together = in_torch.run_batch([photos / "a.png", photos / "b.jpg"])
    np.testing.assert_array_equal(together[1].probability, edges.probability)
    info, theirs = in_torch.info, in_onnx.info
    assert info["engine"] == "mine" and info["threshold"] == theirs["threshold"]
    assert bool(compiled) == info["provider"].endswith("compiled") == (runtime == "torch.compile")
    for name in ("multiple_of", "min_size", "max_size", "backbone"):
        assert getattr(in_torch.manifest, name) == getattr(in_onnx.manifest, name), name


def test_a_student_that_torch_cannot_run(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student.save(tmp_path / "mine", {})
    with pytest.raises(ArgumentError, match="onnxruntime cannot run"):
        EdgeDetector(tmp_path / "mine", runtime="onnxruntime")
    with pytest.raises(EngineError, match=r"no student\.json"):
        EdgeDetector(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="sees no GPU"):
            EdgeDetector(tmp_path / "mine", device="cuda")
    monkeypatch.setattr("trace_sdk.engines.torch.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"trace-sdk\[train\]"):
        EdgeDetector(tmp_path / "mine")


def test_manifest_tells_where_the_engine_comes_from(engine: Path) -> None:
    manifest = open_engine(engine, "cpu").manifest
    assert (manifest.name, manifest.backbone, manifest.precision) == ("tiny", "pixel-flux", "fp16")
    assert manifest.threshold == 0.3 and manifest.default_size == 96
    assert len(manifest.backbone_sha256) == 64 and set(manifest.producers) == {"torch", "onnx", "onnxruntime"}
    assert max(manifest.parity.values()) <= 1e-4


def test_wrong_graph_is_refused(engine: Path, student: Student) -> None:
    other = EngineGraph(student, half_weights=True)
    with torch.no_grad():
        other.student.decoder.residual.bias = torch.nn.Parameter(other.student.decoder.residual.bias + 0.1)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        verify(engine.read_bytes(), other)


def test_precision_must_be_known(student: Student, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="precision"):
        export_onnx(student, tmp_path / "x.onnx", name="x", precision="int3")


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
