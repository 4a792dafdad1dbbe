from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from trace_sdk import EdgeDetector
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.benchmarking import measure, worker
from trace_sdk.benchmarking.measure import benchmark, steps
from trace_sdk.benchmarking.report import Report, Row
from trace_sdk.cli import main
from trace_sdk.engines.plan import MAGIC
from trace_sdk.errors import ArgumentError, EngineError, ImageError, MissingExtraError
from trace_sdk.teacher.teacher import TeacherSettings

MakeEngine = Callable[..., bytes]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "a.png"
    rough = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    PIL.Image.fromarray(rough).resize((80, 60)).save(file)
    return file


@pytest.fixture(scope="module")
def engines(make_engine: MakeEngine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny engine, and one that answers half as much."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "a.onnx").write_bytes(make_engine())
    (folder / "b.onnx").write_bytes(make_engine(gain=0.5, name="half"))
    return [folder / "a.onnx", folder / "b.onnx"]


@pytest.fixture(scope="module")
def report(engines: list[Path], photo: Path) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "COLD_STARTS", 1)
        said: list[str] = []
        report = benchmark(engines, [photo], size=64, runs=6, rounds=2, batches=(1, 3), on_step=said.append)
        assert len(said) == steps(engines, 2)
    return report


def test_every_photo_is_looked_at_before_anything_is_timed(engines: list[Path], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no photo")
    said: list[str] = []
    with pytest.raises(ImageError, match=r"notes\.jpg: is text"):
        benchmark(engines, [photo, tmp_path / "notes.jpg"], on_step=said.append)
    assert not said


def test_so_is_the_folder(engines: list[Path], photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "benchmark", None)
    result = CliRunner().invoke(main, ["benchmark", str(engines[0]), "-o", str(photo)])
    assert result.exit_code == 1 and "Cannot write" in result.stderr


def test_where_no_engine_could_be_measured_the_exit_code_says_so(
    engines: list[Path], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "benchmark", lambda *_, **__: Report(1, 1, 1, missing={"tiny on cpu": "no memory"}))
    result = CliRunner().invoke(main, ["benchmark", str(engines[0])])
    assert result.exit_code == 1 and "tiny on cpu: not measured (no memory)" in result.stdout


def row(report: Report, name: str) -> Row:
    return next(row for row in report.rows if row.name == name)


def test_each_method_is_measured(report: Report, engines: list[Path], photo: Path) -> None:
    assert {"tiny fp32 on cpu", "half fp32 on cpu", "Canny (scikit-image)"} <= {row.name for row in report.rows}
    tiny = row(report, "tiny fp32 on cpu").to_dict()
    assert 0 < tiny["p50_ms"] <= tiny["p90_ms"] <= tiny["p99_ms"] and tiny["answers"] == 12
    assert set(tiny["stages_p50_ms"]) == {"decode", "resize", "network", "resize_back"}
    assert set(tiny["images_per_second"]) == {1, 3} and min(tiny["images_per_second"].values()) > 1
    assert 20 < tiny["peak_memory_mib"]["single"] <= tiny["peak_memory_mib"]["3"] < 500
    assert tiny["info"]["padded_size"] == [64, 48] and tiny["info"]["threads"] >= 1
    (cold,) = tiny["cold_starts"]
    parts = cold["imports"] + cold["open"] + cold["first_answer"]
    assert 0 < parts < cold["total"], "the interpreter's own start counts as well"
    for one in tiny["rounds"]:
        stages = [sum(parts) for parts in zip(*one["stages"].values(), strict=True)]
        assert all(part <= whole for part, whole in zip(stages, one["milliseconds"], strict=True))


def test_speed_is_shown_with_how_far_answers_are_apart(report: Report, engines: list[Path], photo: Path) -> None:
    probability = EdgeDetector(engines[0], size=64).run(photo).probability
    assert row(report, "tiny fp32 on cpu").change == 0
    assert row(report, "half fp32 on cpu").change == pytest.approx(probability.mean() / 2, rel=1e-4)
    assert row(report, "Canny (scikit-image)").change is None


def test_what_was_not_measured_is_named(report: Report) -> None:
    reasons = report.to_dict()["not_measured"]
    assert "structured forests" in reasons
    measured = {row.name for row in report.rows}
    assert "Canny (OpenCV)" in measured or "pip install opencv" in reasons["Canny (OpenCV)"]


def test_files(report: Report, tmp_path: Path) -> None:
    record, markdown, picture = report.save(tmp_path / "new", plot=True)
    facts = json.loads(record.read_text())
    about = facts["provenance"]
    assert about["hardware"]["cpu"] and about["hardware"]["usable_cores"] >= 1
    assert {"numpy", "onnxruntime", "python"} <= set(about["versions"]) and "commit" in about and "load_after" in about
    assert set(facts["methods"]) == {row.name for row in report.rows}
    text = markdown.read_text()
    assert report.verdict() in text and "not measured" in text and about["hardware"]["cpu"] in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("| tiny fp32 on cpu")]
    assert rows == [7, 7, 6]
    shown = np.asarray(PIL.Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"))
    assert shown.shape[1] > 600 and shown.std() > 20


def made(*rounds: list[float]) -> Row:
    return Row("engine", None, [{"total": 1.0}], [{"milliseconds": times} for times in rounds], None)


@pytest.mark.parametrize(
    ("rounds", "differ", "verdict"),
    [
        ([[10.0, 10, 90], [10.4, 10.4, 1], [10.2, 10.2, 10.2]], 0.4 / 10.2, "Repeats: the medians of 3 rounds"),
        ([[10.0] * 3, [10.6] * 3], 0.6 / 10.3, "Noisy machine: the medians of 2 rounds differ by up to 6% (engine)"),
        ([[10.0] * 3], 0.0, "One round only"),
    ],
)
def test_whether_it_repeats(rounds: list[list[float]], differ: float, verdict: str) -> None:
    one = made(*rounds)
    assert one.differ == pytest.approx(differ)
    assert Report(runs=3, rounds=len(rounds), photos=1, rows=[one]).verdict().startswith(verdict)


def test_quantiles_are_over_all_rounds() -> None:
    one = made([float(value) for value in range(0, 101, 2)], [float(value) for value in range(1, 100, 2)])
    assert [one.quantile(q) for q in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert median([50.0, 50.0]) == one.quantile(0.5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"engines": []}, ArgumentError, "at least one engine"),
        ({"engines": ["trace-small", "trace-small"]}, ArgumentError, "only once"),
        ({"engines": ["missing.onnx"]}, EngineError, "no such engine file"),
        ({"photos": ["missing.jpg"]}, ImageError, "no such file"),
        ({"runs": 0}, ArgumentError, "runs must be at least 1"),
        ({"rounds": 0}, ArgumentError, "rounds must be at least 1"),
        ({"batches": []}, ArgumentError, "batches must be at least 1"),
        ({"batches": [2, 0]}, ArgumentError, "batches must be at least 1"),
    ],
)
def test_bad_requests_fail_before_anything_is_timed(
    changes: dict[str, Any], error: type[Exception], message: str, engines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(task: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(measure, "_in_a_process", started)
    with pytest.raises(error, match=message):
        benchmark(**{"engines": engines[:1], **changes})


def test_a_device_that_does_not_start_is_not_measured(
    engines: list[Path], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "COLD_STARTS", 1)
    monkeypatch.setattr(measure, "ways", lambda *_: [("cpu", "auto"), ("cuda:9", "auto")])
    monkeypatch.setattr(measure, "installed_baselines", lambda: [])
    report = benchmark(engines[:1], [photo], size=64, runs=1, rounds=1, batches=(1,))
    assert [row.name for row in report.rows] == ["tiny fp32 on cpu"]
    assert "device='cuda:9'" in report.missing["tiny fp32 on cuda:9"]


@pytest.mark.parametrize(
    ("available", "gpus", "expected"),
    [
        (["CPU"], [], [("cpu", "auto")]),
        (["CUDA", "CPU"], [], [("cpu", "auto"), ("cuda", "auto")]),
        (
            ["Tensorrt", "CUDA", "CPU"],
            ["NVIDIA L4"],
            [("cpu", "auto"), ("cuda", "auto"), ("cuda", "onnxruntime-tensorrt"), ("cuda", "tensorrt-rtx")],
        ),
    ],
)
def test_every_way_to_run_an_engine_that_is_installed(
    available: list[str], gpus: list[str], expected: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: [f"{name}ExecutionProvider" for name in available]
    )
    monkeypatch.setattr(measure, "gpus", lambda: gpus)
    monkeypatch.setattr(measure, "find_spec", lambda module: module == "tensorrt_rtx_bindings")
    assert measure.ways("trace-small") == expected


def test_a_plan_and_a_student_have_one_way_each(tmp_path: Path) -> None:
    """A plan that was not called .engine was tried on the CPU."""
    plan = tmp_path / "a.plan"
    plan.write_bytes(MAGIC + b"...")
    assert measure.ways(plan) == [("cuda", "auto")] and measure.ways(tmp_path) == [("auto", "torch")]


def test_the_teacher_is_a_baseline(
    tiny_backbone: PixelBackbone, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WARMUP", 0)
    monkeypatch.setattr("trace_sdk.teacher.teacher.TeacherSettings", partial(TeacherSettings, size=64, stride=300))
    tiny_backbone.save(tmp_path / "backbone")
    task = {"baseline": "teacher", "file": str(tmp_path / "backbone"), "photos": [str(photo)]}
    outcome = worker._warm({**task, "runs": 1, "seconds": 1, "batches": [1]})
    assert len(outcome["milliseconds"]) == 1 and outcome["stages"]["network"][0] > 1
    assert outcome["info"]["what"] == "IEP and ABDiv" and outcome["images_per_second"] == {}


def test_structured_forests_need_their_model(tmp_path: Path) -> None:
    (tmp_path / "model.yml.gz").write_bytes(b"no model")
    with pytest.raises((ArgumentError, MissingExtraError), match=r"cannot read it|opencv-contrib"):
        worker.BASELINES["structured forests"](str(tmp_path / "model.yml.gz"))


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(EngineError, match="x: its process ended with code 1"):
        measure._in_a_process({"engine": "x"})


def test_command(engines: list[Path], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COLD_STARTS", 1)
    monkeypatch.setattr(measure, "installed_baselines", lambda: [])
    arguments = ["benchmark", engines[0], "--photo", photo, "--size", 64, "--runs", 2, "--rounds", 1, "--batch", 2]
    result = CliRunner().invoke(main, [str(part) for part in [*arguments, "-o", tmp_path / "speed"]])
    assert result.exit_code == 0, result.output
    for part in ("tiny fp32 on cpu", "p99", "resize back", "×2", "One round only", "not measured", "latency.md"):
        assert part in result.stdout
    assert json.loads((tmp_path / "speed/latency.json").read_text())["rounds"] == 1
    wrong = CliRunner().invoke(main, ["benchmark", "--plot"])
    assert wrong.exit_code == 2 and "-o DIR" in wrong.output
    missing = CliRunner().invoke(main, ["benchmark", "missing.onnx"])
    assert missing.exit_code == 1 and missing.stderr.startswith("error: missing.onnx")
    assert "Examples:" in CliRunner().invoke(main, ["benchmark", "--help"]).stdout
