"""An app's tests run without a network, and a picture's edges come in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector, MockEngine, TraceError, detect
from trace_sdk.engines import Engine
from trace_sdk.errors import ArgumentError, EngineError

STEP = np.zeros((40, 60, 3), np.uint8)
STEP[:, 30:] = 255


def test_its_edges_are_where_colours_change() -> None:
    engine = MockEngine(size=60, threshold=0.4)
    assert isinstance(engine, Engine)
    edges = EdgeDetector(engine).run(STEP)
    assert edges.threshold == 0.4 and edges.info["engine"] == "mock"
    assert (edges.probability == (np.arange(60) == 30)).all()
    lying = STEP.transpose(1, 0, 2)
    assert (EdgeDetector(engine).run(lying).probability == (np.arange(60) == 30)[:, None]).all()


def test_it_is_asked_as_a_network_is() -> None:
    shown: list[tuple[int, ...]] = []

    def answer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        shown.append(batch.shape)
        return np.full(batch.shape[:3], 0.25, np.float32)

    detector = EdgeDetector(MockEngine(answer, size=64))
    found = detector.run_batch([np.zeros((100, 50, 3), np.uint8)] * 3)
    assert sum(shape[0] for shape in shown) == 3 and {shape[1:] for shape in shown} == {(64, 32, 3)}
    assert all(edges.probability.shape == (100, 50) and (edges.probability == 0.25).all() for edges in found)
    shown.clear()
    large = EdgeDetector(MockEngine(answer), size=2048).run(np.zeros((1500, 2048, 3), np.uint8))
    assert large.info["tiles"] == len(shown) > 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda batch: np.full(batch.shape[:3], 1.5), r"values from 1\.5 to 1\.5"),
        (lambda batch: np.full(batch.shape[:3], np.nan), "values from nan"),
        (lambda batch: np.zeros((1, 2, 2)), r"answered \(1, 2, 2\)"),
    ],
)
def test_a_wrong_answer_is_told_as_a_networks_is(answer: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        EdgeDetector(MockEngine(answer)).run(STEP)


def test_an_app_can_practise_a_failure() -> None:
    def fail(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise EngineError("the GPU fell off the bus")

    with pytest.raises(TraceError, match="fell off"):
        EdgeDetector(MockEngine(fail)).run(STEP)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 1.5}, {"threshold": 0}, {"threshold": 1.0}])
def test_what_it_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="must be a whole number of pixels"):
        MockEngine(**wrong)


@pytest.mark.parametrize("engine", [3, b"trace-nano", object(), MockEngine])
def test_an_engine_is_a_name_or_an_engine(engine: Any) -> None:
    with pytest.raises(ArgumentError, match="Give a path, a bundled name, an Engine or None"):
        EdgeDetector(engine)


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"threads": 1}, {"runtime": "onnxruntime"}])
def test_an_open_engine_takes_no_options_of_its_own(option: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="leave them out"):
        EdgeDetector(MockEngine(), **option)
    assert EdgeDetector(MockEngine(), size=100, buckets=[96, 128]).bucket_shapes() == [(96, 128), (128, 128), (128, 96)]


def test_it_needs_no_onnxruntime() -> None:
    code = (
        "import sys, numpy; sys.modules['onnxruntime'] = None; from trace_sdk import MockEngine, detect;"
        "print(detect(numpy.zeros((9, 9, 3), numpy.uint8), MockEngine()).probability.max())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) == 0


def test_detect_keeps_the_engine_open(tiny_engine: Path) -> None:
    first = detect(STEP, tiny_engine, size=64, buckets=[64])
    np.testing.assert_array_equal(
        first.probability, EdgeDetector(tiny_engine, size=64, buckets=[64]).run(STEP).probability
    )
    content = tiny_engine.read_bytes()
    aside = tiny_engine.with_suffix(".aside")
    os.replace(tiny_engine, aside)  # noqa: PTH105
    try:
        again = detect(STEP, tiny_engine, size=64, buckets=[64])
        np.testing.assert_array_equal(again.probability, first.probability)
        with pytest.raises(EngineError, match="no such engine file"):
            detect(STEP, tiny_engine, size=96)
    finally:
        os.replace(aside, tiny_engine)  # noqa: PTH105
    assert tiny_engine.read_bytes() == content


def test_detect_takes_what_a_detector_takes() -> None:
    assert detect(STEP).info["engine"] == "trace-nano"
    with pytest.raises(ArgumentError, match="buckets=512"):
        detect(STEP, buckets=512)  # type: ignore[arg-type]
