from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.engines import onnx, providers
from trace_sdk.engines.gpu_thread import GpuThread
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, ImageError, OutOfMemoryError
from trace_sdk.machine import usable_cpus

MakeEngine = Callable[..., bytes]


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rough = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(rough).resize((width, height), PIL.Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def detector(tiny_engine: Path) -> EdgeDetector:
    return EdgeDetector(tiny_engine)


def test_the_answer_is_the_networks(tiny_engine: Path) -> None:
    step = np.zeros((64, 64), np.uint8)
    step[:, 32:] = 255
    edges = EdgeDetector(tiny_engine, size=64).run(step)
    np.testing.assert_allclose(edges.probability[:, 31:33], 1, atol=1e-5)
    assert max(edges.probability[:, :31].max(), edges.probability[:, 33:].max()) < 1e-6


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 2), (1, 5000), (5000, 1), (63, 100), (111, 63), (128, 128), (300, 77), (17, 4)]
)
def test_the_answer_has_the_inputs_size(detector: EdgeDetector, shape: tuple[int, int]) -> None:
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


def test_a_mirrored_photo_has_mirrored_edges(tiny_engine: Path) -> None:
    detector = EdgeDetector(tiny_engine, size=96)
    picture = photo(96, 96)
    expected = detector.run(picture).probability[:, ::-1]
    np.testing.assert_allclose(detector.run(picture[:, ::-1]).probability, expected, atol=1e-5)


def test_info(detector: EdgeDetector) -> None:
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


def test_tiles_leave_no_seam(make_engine: MakeEngine, tmp_path: Path) -> None:
    picture = photo(150, 400)
    answers = []
    for name, largest in (("whole", 1024), ("tiled", 128)):
        (tmp_path / f"{name}.onnx").write_bytes(make_engine(max_size=largest))
        answers.append(EdgeDetector(tmp_path / f"{name}.onnx", size=400).run(picture))
    whole, tiled = answers
    assert whole.info["tiles"] == 1 and tiled.info["tiles"] == 8
    # A tile's own border is unlike the whole picture only within the 1 px that the gradient reaches.
    assert np.abs(whole.probability - tiled.probability).max() < 0.01


def test_the_network_gets_what_the_manifest_says(make_engine: MakeEngine, tmp_path: Path) -> None:
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


def test_64_threads_give_the_serial_answers(detector: EdgeDetector) -> None:
    pictures = [photo(40 + 7 * (i % 5), 90 - 6 * (i % 4), seed=i) for i in range(64)]
    serial = [detector.run(picture).probability for picture in pictures]
    together = threading.Barrier(64)

    def answer(first: int) -> list[tuple[int, NDArray[np.float32]]]:
        together.wait(timeout=30)
        return [(i % 64, detector.run(pictures[i % 64]).probability) for i in range(first, first + 4)]

    with ThreadPoolExecutor(64) as pool:
        for answers in pool.map(answer, range(64)):
            for number, probability in answers:
                np.testing.assert_array_equal(probability, serial[number])


@pytest.mark.parametrize("batch", [1, 2, 5, 50])
def test_batches_and_streams_give_the_answers_of_run_in_order(detector: EdgeDetector, batch: int) -> None:
    pictures = [photo(60, 80 if i % 3 else 40, seed=i) for i in range(11)]
    expected = [detector.run(picture).probability for picture in pictures]
    for answers in (detector.run_batch(pictures), detector.stream(iter(pictures), batch=batch, prefetch=3)):
        for edges, alone in zip(answers, expected, strict=True):
            np.testing.assert_array_equal(edges.probability, alone)


def test_empty_batches(detector: EdgeDetector) -> None:
    assert detector.run_batch([]) == [] and list(detector.stream([])) == []


def test_a_batch_array_is_several_images(detector: EdgeDetector) -> None:
    assert len(detector.run_batch(np.zeros((3, 20, 20, 3), np.uint8))) == 3


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trace-decode")]


def test_a_stream_left_early_stops_its_threads_and_takes_no_more(detector: EdgeDetector) -> None:
    taken = []

    def endless() -> Iterator[NDArray[np.uint8]]:
        while True:
            taken.append(1)
            yield photo(20, 20)

    stream = detector.stream(endless(), prefetch=3)
    next(stream)
    next(stream)
    assert decoding_threads()
    stream.close()  # type: ignore[attr-defined]
    assert not decoding_threads() and len(taken) <= 6


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_raises_at_the_bad_item(detector: EdgeDetector, batch: int) -> None:
    items: list[Any] = [photo(20, 20), photo(20, 20), np.zeros(3), photo(20, 20)]
    stream = detector.stream(items, batch=batch)
    assert next(stream) and next(stream)
    with pytest.raises(ImageError, match=r"^image 2: shape \(3,\)"):
        next(stream)
    assert not decoding_threads()
    with pytest.raises(ImageError, match=r"^image 2"):
        detector.run_batch(items)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_others_ask_can_answer(tiny_engine: Path) -> None:
    detector, asked = EdgeDetector(tiny_engine, size=512), photo(512, 512)
    expected, done = detector.run(asked).probability, threading.Event()

    def ask() -> None:
        while not done.is_set():
            detector.run(asked)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                same = False
                signal.alarm(20)  # ends it where it waits for a lock that nobody gives back
                try:
                    same = np.array_equal(detector.run(asked).probability, expected)
                finally:
                    os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        for asker in askers:
            asker.join()


def test_an_error_of_the_iterable_waits_for_its_turn(detector: EdgeDetector) -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield photo(20, 20)
        raise RuntimeError("camera unplugged")

    stream = detector.stream(broken())
    assert next(stream)
    with pytest.raises(RuntimeError, match="camera unplugged"):
        next(stream)


@pytest.mark.parametrize(
    "wrong",
    [
        *("a.jpg", b"", Path("a.jpg"), io.BytesIO(), PIL.Image.new("L", (2, 2)), None, 3),
        *(np.zeros((9, 7, 3), np.uint8), np.zeros((9, 7)), torch.zeros(3, 9, 7)),  # gave a map for each row or channel
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_one_image_is_no_batch(detector: EdgeDetector, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="Expected several images"):
        detector.run_batch(wrong)


@pytest.mark.parametrize("options", [{"batch": 0}, {"prefetch": 0}, {"batch": 1.5}, {"batch": True}])
def test_wrong_stream_options(detector: EdgeDetector, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="whole number"):
        detector.stream([], **options)


@pytest.mark.parametrize("size", [15, 8193, 0, -1, 100.0, "512", True, float("nan")])
def test_wrong_sizes(tiny_engine: Path, size: Any) -> None:
    with pytest.raises(ArgumentError, match="16 to 8192"):
        EdgeDetector(tiny_engine, size=size)


def test_size_and_warmup(tiny_engine: Path) -> None:
    detector = EdgeDetector(tiny_engine, size=np.int64(200))  # type: ignore[arg-type]
    detector.warmup()
    assert detector.run(photo(10, 20)).info["network_size"] == (200, 100)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "", 0, None])
def test_unknown_devices(tiny_engine: Path, device: Any) -> None:
    with pytest.raises(ArgumentError, match="'auto', 'cpu', 'cuda' or 'cuda:N'"):
        EdgeDetector(tiny_engine, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error(tiny_engine: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [onnx.CPU])
    with pytest.raises(DeviceError, match="onnxruntime-gpu"):
        EdgeDetector(tiny_engine, device=device)


def test_cuda_that_does_not_start_is_no_silent_cpu(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = onnx._session
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [providers.CUDA, onnx.CPU])
    monkeypatch.setattr(onnx, "_session", lambda *given: plain(*given[:-1], [onnx.CPU]))
    with pytest.raises(DeviceError, match="could not start it"):
        EdgeDetector(tiny_engine, device="cuda")
    assert EdgeDetector(tiny_engine).info["device_reason"] == "auto: CUDA did not start"


@pytest.mark.parametrize("gain", [float("nan"), 20.0, -1.0, float("inf")])
def test_wrong_answers_of_the_network_are_errors(make_engine: MakeEngine, tmp_path: Path, gain: float) -> None:
    (tmp_path / "e.onnx").write_bytes(make_engine(gain=gain))
    with pytest.raises(EngineError, match="answered values from"):
        EdgeDetector(tmp_path / "e.onnx").run(photo(64, 64))


def test_a_provider_that_fails_is_no_silent_cpu(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's Python session would print a line, start again on the CPU and answer."""
    from onnxruntime.capi._pybind_state import EPFail

    engine = onnx.OnnxEngine(tiny_engine.read_bytes(), "tiny")
    monkeypatch.setattr(engine._session, "run_with_iobinding", Mock(side_effect=EPFail("device lost")))
    with pytest.raises(EngineError, match="device lost"):
        engine.infer(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_batch_too_large_for_the_device_is_halved_once(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = onnx.OnnxEngine(tiny_engine.read_bytes(), "tiny")
    batch = np.stack([photo(16, 16, seed) for seed in range(6)])
    expected, engine._gpu_thread = engine.infer(batch), GpuThread("tiny")
    sizes: list[int] = []
    room, word = 3, "BFCArena: Failed to allocate memory for requested buffer of size 9"
    whole, held = engine._session.run_with_iobinding, engine._bound._bound

    def run(binding: Any, options: Any) -> None:
        sizes.append(next(reversed(held))[0])
        if sizes[-1] > room:
            raise RuntimeError(word)
        whole(binding, options)

    monkeypatch.setattr(engine._session, "run_with_iobinding", run)
    np.testing.assert_allclose(engine.infer(batch), expected, atol=1e-6)
    assert sizes == [6, 3, 3]
    assert {shape[0] for shape in held} == {1, 3}, "the batch that failed keeps no memory"
    room = 2
    with pytest.raises(
        OutOfMemoryError, match=r"smaller batch \(here 6, half of it was tried\).*size \(here 16x16.*BFCArena"
    ):
        engine.infer(batch)
    assert sizes[3:] == [6, 3], "halved once"
    np.testing.assert_allclose(engine.infer(batch[:2]), expected[:2], atol=1e-6)
    room = 0
    with pytest.raises(OutOfMemoryError, match=r"memory of cpu is too small. Use a smaller size \(here 16x16"):
        engine.infer(batch[:1])
    word = "device lost"
    with pytest.raises(EngineError, match="device lost"):
        engine.infer(batch)


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
    tiny_engine: Path, size: int, buckets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = EdgeDetector(tiny_engine, size=size, buckets=buckets[::-1])
    shapes = seen_shapes(detector, monkeypatch)
    detector.warmup()
    warmed = set(shapes)
    assert len(shapes) == len(warmed) == 2 * len(buckets) - 1
    for height, width in [(50, 50), (40, 90), (90, 40), (1, 700), (700, 1), (64, 63), (128, 128), (60, 100)]:
        detector.run(photo(height, width))
    assert set(shapes) == warmed, "all of them are met, and no other"


def test_padding_to_a_bucket_is_cut_off_again(tiny_engine: Path) -> None:
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


def test_a_batch_takes_what_is_decoded_and_waits_for_no_other(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = EdgeDetector(tiny_engine)
    sizes: list[int] = []
    infer, released = detector._engine.infer, threading.Event()

    def watched(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(batch))
        return infer(batch)

    class Slow(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            assert released.wait(10)
            return super().read(*size)

    monkeypatch.setattr(detector._engine, "infer", watched)
    monkeypatch.setattr("trace_sdk.detector.usable_cpus", lambda: 6)
    encoded = io.BytesIO()
    PIL.Image.fromarray(photo(20, 20)).save(encoded, "PNG")
    stream = detector.stream([photo(20, 20), *(Slow(encoded.getvalue()) for _ in range(5))], batch=4, prefetch=6)
    next(stream)
    assert sizes == [1], "the first answer waited for pictures that were not decoded"
    released.set()
    time.sleep(0.3)
    list(stream)
    assert sizes == [1, 4, 1]


def test_decoding_runs_ahead(detector: EdgeDetector) -> None:
    taken: list[float] = []

    def items() -> Iterator[NDArray[np.uint8]]:
        for _ in range(8):
            taken.append(time.monotonic())
            yield photo(20, 20)

    next(detector.stream(items(), prefetch=4))
    assert 4 <= len(taken) <= 6
