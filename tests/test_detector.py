from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.errors import ArgumentError
from trace_sdk.machine import usable_cpus

MakeEngine = Callable[..., bytes]
Photo = Callable[..., NDArray[np.uint8]]


def test_the_answer_is_the_networks(tiny_engine: Path) -> None:
    step = np.zeros((64, 64), np.uint8)
    step[:, 32:] = 255
    edges = EdgeDetector(tiny_engine, size=64).run(step)
    np.testing.assert_allclose(edges.probability[:, 31:33], 1, atol=1e-5)
    assert max(edges.probability[:, :31].max(), edges.probability[:, 33:].max()) < 1e-6


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 2), (1, 5000), (5000, 1), (63, 100), (111, 63), (128, 128), (300, 77), (17, 4)]
)
def test_the_answer_has_the_inputs_size(detector: EdgeDetector, shape: tuple[int, int], photo: Photo) -> None:
    edges = detector.run(photo(*shape))
    assert edges.probability.shape == shape and edges.rgb.shape == (*shape, 3)
    assert edges.probability.dtype == np.float32
    assert edges.probability.min() >= 0 and edges.probability.max() <= 1
    assert max(edges.info["network_size"]) == 128
    assert edges.thin().shape == edges.binary().shape == shape
    assert edges.overlay().size == shape[::-1]


def test_a_border_makes_no_edge(detector: EdgeDetector) -> None:
    for shape in [(50, 37), (128, 100), (1, 1)]:
        assert detector.run(np.full(shape, 255, np.uint8)).probability.max() < 1e-6


def test_a_mirrored_photo_has_mirrored_edges(tiny_engine: Path, photo: Photo) -> None:
    detector = EdgeDetector(tiny_engine, size=96)
    picture = photo(96, 96)
    expected = detector.run(picture).probability[:, ::-1]
    np.testing.assert_allclose(detector.run(picture[:, ::-1]).probability, expected, atol=1e-5)


def test_info(detector: EdgeDetector, photo: Photo) -> None:
    info = detector.run(photo(50, 100)).info
    assert info["engine"] == "tiny" and len(info["engine_sha256"]) == 64
    assert info["device"] == "cpu" and info["device_reason"].startswith("auto: ")
    assert info["provider"] == "CPUExecutionProvider"
    assert info["input_size"] == (100, 50) and info["network_size"] == (128, 64)
    assert info["tiles"] == 1 and info["source"] == "array"
    stages = info["timings"]
    assert list(stages) == ["decode", "resize", "network", "resize_back", "total"]
    assert stages["total"] == pytest.approx(sum(stages.values()) / 2)
    assert detector.info.items() <= info.items()


def test_tiles_leave_no_seam(make_engine: MakeEngine, tmp_path: Path, photo: Photo) -> None:
    picture = photo(150, 400)
    answers = []
    for name, largest in (("whole", 1024), ("tiled", 128)):
        (tmp_path / f"{name}.onnx").write_bytes(make_engine(max_size=largest))
        answers.append(EdgeDetector(tmp_path / f"{name}.onnx", size=400).run(picture))
    whole, tiled = answers
    assert whole.info["tiles"] == 1 and tiled.info["tiles"] == 8
    # A tile's own border is unlike the whole picture only within the 1 px that the gradient reaches.
    assert np.abs(whole.probability - tiled.probability).max() < 0.01


def test_the_network_gets_what_the_manifest_says(make_engine: MakeEngine, tmp_path: Path, photo: Photo) -> None:
    path = tmp_path / "engine.onnx"
    path.write_bytes(make_engine(multiple_of=24, min_size=48, max_size=96, default_size=60))
    detector = EdgeDetector(path)
    shapes = []
    infer = detector._engine.infer

    def watched(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        shapes.append(batch.shape)
        return infer(batch)

    detector._engine.infer = watched  # type: ignore[method-assign]
    for shape in [(60, 30), (5, 500), (61, 61)]:
        detector.run(photo(*shape))
    assert shapes == [(1, 72, 48, 3), (1, 48, 72, 3), (1, 72, 72, 3)]


@pytest.mark.parametrize("size", [15, 8193, 0, -1, 100.0, "512", True, float("nan")])
def test_wrong_sizes(tiny_engine: Path, size: Any) -> None:
    with pytest.raises(ArgumentError, match="16 to 8192"):
        EdgeDetector(tiny_engine, size=size)


def test_size_and_warmup(tiny_engine: Path, photo: Photo) -> None:
    detector = EdgeDetector(tiny_engine, size=np.int64(200))  # type: ignore[arg-type]
    detector.warmup()
    assert detector.run(photo(10, 20)).info["network_size"] == (200, 100)


def test_threads(tiny_engine: Path) -> None:
    assert EdgeDetector(tiny_engine).info["threads"] == usable_cpus()
    assert EdgeDetector(tiny_engine, threads=3).info["threads"] == 3
    options = EdgeDetector(tiny_engine, threads=3)._engine._session.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 3
    for wrong in (0, -1, 1.5, True, "2", 1025):
        with pytest.raises(ArgumentError, match="threads="):
            EdgeDetector(tiny_engine, threads=wrong)  # type: ignore[arg-type]


def seen_shapes(detector: EdgeDetector, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the height and width of whatever the engine is given."""
    shapes = []
    infer = detector._engine.infer

    def watched(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        shapes.append(batch.shape[1:3])
        return infer(batch)

    monkeypatch.setattr(detector._engine, "infer", watched)
    return shapes


@pytest.mark.parametrize(("size", "buckets"), [(128, [64, 96, 128]), (100, [48, 128]), (300, [64, 128])])
def test_after_warmup_no_shape_is_new(
    tiny_engine: Path, size: int, buckets: list[int], monkeypatch: pytest.MonkeyPatch, photo: Photo
) -> None:
    detector = EdgeDetector(tiny_engine, size=size, buckets=buckets[::-1])
    shapes = seen_shapes(detector, monkeypatch)
    detector.warmup()
    warmed = set(shapes)
    assert len(shapes) == len(warmed) == 2 * len(buckets) - 1
    for height, width in [(50, 50), (40, 90), (90, 40), (1, 700), (700, 1), (64, 63), (128, 128), (60, 100)]:
        detector.run(photo(height, width))
    assert set(shapes) == warmed, "all of them are met, and no other"


def test_padding_to_a_bucket_is_cut_off_again(tiny_engine: Path, photo: Photo) -> None:
    """This engine sees no further than 1 px, so its answers are the same but for rounding."""
    plain, bucketed = EdgeDetector(tiny_engine), EdgeDetector(tiny_engine, buckets=[96, 256])
    for shape in [(50, 37), (128, 100), (1, 1), (30, 128), (128, 128)]:
        expected, edges = plain.run(photo(*shape)), bucketed.run(photo(*shape))
        np.testing.assert_allclose(edges.probability, expected.probability, atol=1e-5)
        assert set(edges.info["padded_size"]) <= {96, 256}
        assert edges.info["network_size"] == expected.info["network_size"]
    assert bucketed.info["buckets"] == (96, 256) and plain.info["buckets"] == ()


@pytest.mark.parametrize("buckets", [[], [60], [8], [2048], [64.0], ["64"], [True], [64, -8], "64", 64])
def test_wrong_buckets(tiny_engine: Path, buckets: Any) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8 from 16 to 1024"):
        EdgeDetector(tiny_engine, buckets=buckets)
