"""Every runtime on a GPU gives the CPU's answers; each test is skipped with what it lacks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.errors import DeviceError, MissingExtraError, OutOfMemoryError

RUNTIMES = ["onnxruntime", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"]


def photo(seed: int) -> NDArray[np.uint8]:
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.kron(cells, np.ones((12, 12, 1), np.uint8))


@pytest.fixture(params=RUNTIMES)
def detector(
    request: pytest.FixtureRequest, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EdgeDetector:
    monkeypatch.setenv("TRACE_CACHE", f"{tmp_path}/cache")
    try:
        detector = EdgeDetector(tiny_engine, device="cuda", runtime=request.param)
    except (DeviceError, MissingExtraError) as error:
        pytest.skip(str(error))
    detector.warmup()
    return detector


def test_the_gpu_answers_as_the_cpu_does(detector: EdgeDetector, tiny_engine: Path) -> None:
    on_cpu = EdgeDetector(tiny_engine, device="cpu")
    assert detector.info["device"] == "cuda:0"
    for edges, seed in zip(detector.run_batch([photo(seed) for seed in range(11)]), range(11), strict=True):
        np.testing.assert_allclose(edges.probability, on_cpu.run(photo(seed)).probability, atol=2e-3)


def test_64_threads_give_the_serial_answers(detector: EdgeDetector) -> None:
    serial = [detector.run(photo(seed)).probability for seed in range(8)]
    with ThreadPoolExecutor(64) as pool:
        for number, edges in enumerate(pool.map(lambda n: detector.run(photo(n % 8)), range(256))):
            np.testing.assert_array_equal(edges.probability, serial[number % 8])


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_each_bucket_shape_is_captured_and_answers_as_before(
    runtime: str, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE_CACHE", f"{tmp_path}/cache")
    try:
        plain = EdgeDetector(tiny_engine, device="cuda", runtime=runtime)
    except (DeviceError, MissingExtraError) as error:
        pytest.skip(str(error))
    captured = EdgeDetector(tiny_engine, device="cuda", runtime=runtime, buckets=[96, 128])
    captured.warmup()
    assert captured.info["cuda_graphs"] == 3, captured.info["device_reason"]
    for seed in range(6):
        picture = photo(seed)[: 108 - 20 * (seed % 2)]
        # This engine sees 1 px far, so padding to a bucket changes nothing.
        np.testing.assert_allclose(captured.run(picture).probability, plain.run(picture).probability, atol=2e-3)
    assert captured.info["cuda_graphs"] == 3 and "pinned" in captured.info["memory"]


def test_a_full_gpu_is_an_error_and_the_next_answer_comes(detector: EdgeDetector) -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    before = detector.run(photo(0)).probability
    _, free, _ = cuda.cudaMemGetInfo()
    error, taken = cuda.cudaMalloc(free - (16 << 20))
    assert not int(error)
    with pytest.raises(OutOfMemoryError, match="smaller"):
        detector._engine.infer(np.zeros((8, 1024, 1024, 3), np.uint8))
    cuda.cudaFree(taken)
    np.testing.assert_array_equal(detector.run(photo(0)).probability, before)
