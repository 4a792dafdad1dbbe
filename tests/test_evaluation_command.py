"""`evaluate` from a data set to the table: same thinning for all, resume, maps of others, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("scipy", reason="needs trace-sdk[evaluate]")
pytest.importorskip("skimage", reason="needs trace-sdk[evaluate]")

from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.evaluation import evaluate as evaluation
from trace_sdk.evaluation import methods
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.edges import count_edges
from trace_sdk.evaluation.evaluate import evaluate
from trace_sdk.evaluation.methods import EdgeFolder, EngineMethod, Function, read_edges
from trace_sdk.thinning import thin_ridges

NAMES = ("a", "b", "c")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Three scenes of two touching rectangles, and perfect edge maps of them in maps/."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    (tmp_path / "maps").mkdir()
    for shift, name in enumerate(NAMES):
        ids = np.zeros((144, 192), np.uint8)
        ids[24:120, 30 + shift : 90], ids[24:120, 90:162] = 1, 2
        rgb = np.array([[20, 30, 40], [200, 60, 60], [60, 200, 90]], np.uint8)[ids]
        Image.fromarray(rgb).save(folder / f"{name}.png")
        Image.fromarray(ids).save(folder / f"{name}.ids.png")
    for sample in open_dataset(folder):
        np.save(tmp_path / "maps" / f"{sample.name}.npy", sample.boundaries[0].astype(np.float32))
    return folder


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def quality(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "quality.json").read_text())
    return content


def test_command_writes_one_table(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(scenes, "-o", out, "--edges", f"mine={tmp_path / 'maps'}", "--thresholds", "9", "--workers", "1")
    assert result.exit_code == 0, result.output
    table = quality(out)
    assert set(table["methods"]) == {"canny", "lab-gradient", "mine"}
    for row in table["methods"].values():
        assert row["scenes"]["images"] == 3
        assert 0.8 < row["scenes"]["ods"] <= 1
    assert table["methods"]["mine"]["scenes"]["seconds"] is None
    assert table["not_measured"] == {
        "structured forests": "not measured (OpenCV's model is in no package; give maps of it by --edges)"
    }
    assert table["provenance"]["thresholds"] == 9
    assert table["provenance"]["max_dist"] == 0.0075
    assert {"commit", "command", "date", "hardware", "libraries", "trace_sdk"} <= set(table["provenance"])
    markdown = (out / "quality.md").read_text().splitlines()
    rows = [line for line in markdown if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "canny",
        "lab-gradient",
        "mine",
        "structured forests",
    ]


def test_a_run_that_was_cut_goes_on(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--thresholds", "5", "--workers", "1")
    assert run(scenes, "-o", whole, *options).exit_code == 0
    count, calls = count_edges, 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return count(*arguments, **keywords)

    monkeypatch.setattr(evaluation, "count_edges", counted)
    assert run(scenes, "-o", cut, *options).exit_code == 130
    assert len(list(cut.rglob("*.json"))) == 4
    assert run(scenes, "-o", cut, *options).exit_code == 0
    assert calls == 5 + 2

    def scores(out: Path) -> list[list[float]]:
        rows = quality(out)["methods"].values()
        return [[row["scenes"][key] for key in ("ods", "ois", "ap", "cldice")] for row in rows]

    assert scores(whole) == scores(cut)
    assert run(scenes, "-o", cut, *options).exit_code == 0
    assert calls == 7


def test_changed_photo_is_done_again(scenes: Path, tmp_path: Path) -> None:
    method, cache = Function("flat", lambda rgb: np.zeros(rgb.shape[:2], np.float32)), tmp_path / "cache"
    evaluate(open_dataset(scenes), method, thresholds=1, cache=cache)
    assert len(list(cache.rglob("*.json"))) == 3
    Image.fromarray(np.zeros((144, 192, 3), np.uint8)).save(scenes / "a.png")
    evaluate(open_dataset(scenes), method, thresholds=1, cache=cache)
    assert len(list(cache.rglob("*.json"))) == 4


def test_damaged_cache_is_named(scenes: Path, tmp_path: Path) -> None:
    method = Function("flat", lambda rgb: np.zeros(rgb.shape[:2], np.float32))
    evaluate(open_dataset(scenes), method, thresholds=1, cache=tmp_path / "cache")
    file = next((tmp_path / "cache").rglob("*.json"))
    file.write_text("{}")
    with pytest.raises(DatasetError, match=file.name):
        evaluate(open_dataset(scenes), method, thresholds=1, cache=tmp_path / "cache")


def test_worker_processes_give_the_same_scores(scenes: Path, tmp_path: Path) -> None:
    dataset, method = open_dataset(scenes), EdgeFolder("mine", tmp_path / "maps")
    alone = evaluate(dataset, method, thresholds=3, workers=1)
    assert evaluate(dataset, method, thresholds=3, workers=2) == alone


def test_a_fault_in_a_worker_arrives(scenes: Path) -> None:
    with pytest.raises(ArgumentError, match="max_dist is 7"):
        evaluate(open_dataset(scenes), methods.BASELINES[1], thresholds=3, workers=2, max_dist=7)


def test_answers_outside_of_the_range_are_refused(scenes: Path) -> None:
    wild = Function("wild", lambda rgb: np.full(rgb.shape[:2], 7, np.float32))
    with pytest.raises(ArgumentError, match=r"not in \[0, 1\]"):
        evaluate(open_dataset(scenes), wild)


def test_thick_maps_are_thinned() -> None:
    column = np.arange(60, dtype=np.float32)
    bump = np.tile(np.exp(-((column - 30) ** 2) / 18), (50, 1)).astype(np.float32)
    assert np.flatnonzero(thin_ridges(bump)[25] > 0.1).tolist() == [30]


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_edge_maps_as_png(scenes: Path, tmp_path: Path, depth: type) -> None:
    dataset = open_dataset(scenes).first(1)
    (sample,) = dataset
    folder = tmp_path / "png" / dataset.name
    folder.mkdir(parents=True)
    grey = sample.boundaries[0].astype(depth) * depth(np.iinfo(depth).max // 5)
    Image.fromarray(grey).save(folder / "a.png")
    edges = EdgeFolder("mine", tmp_path / "png").edges(dataset, sample)
    assert edges.dtype == np.float32
    assert edges.max() == pytest.approx(0.2)


def test_edge_maps_with_a_palette_and_as_tiff(tmp_path: Path) -> None:
    """Tools that make PNGs small number the greys; the numbers were taken for edges."""
    grey = np.array([[0, 255, 51]], np.uint8)
    Image.fromarray(grey).convert("RGB").quantize(3).save(tmp_path / "p.png")
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    Image.fromarray((grey / np.float32(255)).astype(np.float32)).save(tmp_path / "t.tif")
    Image.fromarray(grey).save(tmp_path / "u.tif")
    for name in ("p.png", "t.tif", "u.tif"):
        assert np.allclose(read_edges(tmp_path / name), [[0, 1, 0.2]]), name
    assert read_edges(tmp_path / "bits.png").tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((144, 193), np.float32), r"\[144, 193\]"),
        (np.zeros((144, 192, 3), np.float32), r"float array \[H, W\]"),
        (np.zeros((144, 192), np.int32), r"float array \[H, W\]"),
        (np.full((144, 192), np.nan, np.float32), "NaN"),
        (np.full((144, 192), 255, np.float32), r"not in \[0, 1\]"),
        (np.array([{}]), "cannot be read"),
        (np.zeros((0, 192), np.float32), "empty"),
    ],
)
def test_malformed_edge_maps(scenes: Path, tmp_path: Path, array: NDArray[Any], said: str) -> None:
    np.save(tmp_path / "maps" / "b.npy", array)
    with pytest.raises(DatasetError, match=rf"b\.npy.*{said}"):
        evaluate(open_dataset(scenes), EdgeFolder("mine", tmp_path / "maps"), thresholds=1)


def test_missing_edge_map_is_said_before_the_work(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "maps" / "c.npy").unlink()
    result = run(scenes, "-o", tmp_path / "out", "--edges", f"mine={tmp_path / 'maps'}")
    assert result.exit_code == 1
    assert "c.png is missing" in result.output
    assert not (tmp_path / "out").exists()


def test_engine_rows(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Detector:
        info = {"engine_sha256": "00", "size": 320, "provider": "fake"}  # noqa: RUF012

        def __init__(self, engine: str, *, device: str, size: int | None) -> None:
            assert (engine, device, size) == ("mine.onnx", "auto", 320)

        def run(self, rgb: NDArray[np.uint8]) -> Any:
            class Answer:
                probability = np.zeros(rgb.shape[:2], np.float32)

            return Answer

    monkeypatch.setattr(methods, "EdgeDetector", Detector)
    engine = EngineMethod("mine.onnx", size=320)
    scores = evaluate(open_dataset(scenes), engine, thresholds=1)
    assert engine.name == "mine.onnx @320"
    assert scores.ods == 0
    assert scores.seconds is not None


def test_answer_of_another_size(scenes: Path) -> None:
    with pytest.raises(ArgumentError, match="as large as the photo"):
        evaluate(open_dataset(scenes), Function("small", lambda rgb: np.zeros((3, 3), np.float32)))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nowhere",), 1, "is not a folder"),
        (("{scenes}", "--edges", "mine"), 2, "NAME=PATH"),
        (("{scenes}", "--edges", "canny={scenes}"), 2, "Two methods"),
        (("{scenes}", "{scenes}"), 2, "same name"),
        (("{scenes}", "--engine", "nowhere.onnx"), 1, "no such engine file"),
        ((), 2, "Missing argument"),
    ],
)
def test_wrong_usage(scenes: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = run(*(text.format(scenes=scenes) for text in arguments), "-o", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert said in result.output


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from trace_sdk.cli.evaluate import command; "
        "print([m for m in ('scipy', 'skimage', 'pycocotools', 'torch', 'onnxruntime') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    assert "Examples:" in run("--help").output
