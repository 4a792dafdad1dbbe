"""The benchmark scripts on a CPU: they check before they time, and their full-size models are what they say."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.student.model import Student

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(file: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# By these names the scripts import them.
on_device, layers, _ = (script(f"{name}.py", name) for name in ("on_device", "layers", "timing"))
kernels, teacher = script("kernels.py", "benchmark_kernels"), script("teacher.py", "benchmark_teacher")
latency = script("gpu_latency.py", "benchmark_gpu_latency")
TINY = layers.Case("tiny", (16, 16), 2, 16, text=3)
PEAKS = kernels.Peaks(flops=1e9, exponentials=1e8, bandwidth=1e9)


def test_every_way_is_timed_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "peak_on_cpu", lambda *_: 1.0)
    with torch.no_grad():
        rows = kernels.measure(TINY, "cpu", 2, PEAKS, [way for way in kernels.WAYS if way != "torch.compile"])
    assert rows[0]["way"] == kernels.BASELINE and not any("trouble" in row for row in rows)
    for row in rows:
        assert row["speedup"] > 0 and row["times_floor"] > 0
        if row["way"] not in kernels.ANOTHER_QUANTITY:
            assert row["error"] < 1e-3
    result = {"device": "test", "runs": 2, "rows": rows}
    assert kernels.to_markdown(result).count("| tiny |") == len(rows)
    kernels.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_memory_is_of_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that holds 64 MiB raises the resident set by about as much, whatever was held before."""
    monkeypatch.syspath_prepend(FOLDER)
    peak = on_device.peak_on_cpu(functools.partial(functools.partial, torch.ones), 2**24)
    assert 50 <= peak <= 90


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.WAYS, "kernels: map", lambda x: 2 * kernels.hook(x))
    monkeypatch.setattr(kernels, "peak_on_cpu", lambda *_: 1.0)
    with torch.no_grad():
        _, row = kernels.measure(TINY, "cpu", 1, PEAKS, [kernels.BASELINE, "kernels: map"])
    assert row["trouble"] == "wrong, so not timed" and "warm_ms" not in row


def test_the_floor_is_the_slower_of_products_and_exponentials() -> None:
    scores = 2 * 256**2
    assert PEAKS.floor_ms(TINY) == pytest.approx(max(2 * scores * 16 / 1e9, scores / 1e8) * 1e3)


@pytest.mark.parametrize("module", [kernels, teacher, script("tiles.py", "benchmark_tiles")])
def test_without_a_gpu_it_says_so(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main() == 2
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("name", teacher.MODELS["cuda"])
def test_full_size_models_show_the_attention_they_promise(name: str) -> None:
    """Built and run on torch's meta device: real shapes, no weights."""
    seen: list[SelfAttention] = []
    with torch.device("meta"), torch.no_grad():
        model = teacher.MODELS["cuda"][name]("meta")
        model.forward(0.2, seen.append)
    assert len(seen) == model.blocks
    assert max(attention.grid for attention in seen) == model.grid
    assert all(attention.query.shape[2] == attention.grid[0] * attention.grid[1] for attention in seen)


def test_hooks_and_kernels_agree_on_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(teacher.MODELS["cpu"], "trace-small-512", lambda device: teacher.pixel(device, 64))
    monkeypatch.setattr(teacher, "peak_on_cpu", lambda *_: 1.0)
    monkeypatch.setattr(sys, "argv", ["t", "--device", "cpu", "--stride", "400", "--runs", "1", "-o", str(tmp_path)])
    assert teacher.main() == 0
    torch.set_grad_enabled(True)
    result = json.loads((tmp_path / "teacher-cpu.json").read_text())
    assert [row["way"] for row in result["rows"]] == ["model alone", "hooks", "kernels"]
    assert 0 < result["rows"][1]["disagreement"] < 1e-2
    assert "| kernels |" in (tmp_path / "teacher-cpu.md").read_text()


@pytest.mark.parametrize(("name", "denoiser", "grid"), [("sd15", 859_520_964, 128), ("sd35-large", 8_056_627_520, 64)])
def test_random_students_have_the_published_sizes(name: str, denoiser: int, grid: int) -> None:
    with torch.device("meta"):
        student = latency.RANDOM[name]("meta")
    assert sum(value.numel() for value in student.backbone.denoiser.parameters()) == denoiser
    assert student.backbone.token_grid((1024, 1024)) == (grid, grid) and student.max_size == 1024


def test_latency_of_tasks_that_work_and_of_one_that_does_not(
    tiny_backbone: PixelBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(latency.RANDOM, "sd15", lambda device: Student(tiny_backbone))
    tasks = ["sd15:torch:128", "trace-nano:onnxruntime:128", "trace-nano:torch:128"]
    rest = ["--device", "cpu", "--runs", "2", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_latency", *tasks, *rest])
    assert latency.main() == 1
    rows = {row["task"]: row for row in json.loads((tmp_path / "gpu-latency.json").read_text())["rows"]}
    assert "cannot be run by torch" in rows[tasks[2]]["trouble"]
    for task in tasks[:2]:
        assert len(rows[task]["milliseconds"]) == 2 and 0 < rows[task]["p50"] <= rows[task]["p99"]
        assert set(rows[task]["stages"]) == set(latency.STAGES)
    assert f"| {tasks[0]} |" in (tmp_path / "gpu-latency.md").read_text()
