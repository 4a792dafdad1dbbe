"""Many pictures: batches, streams, threads and forks."""

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

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.errors import ArgumentError, ImageError

Photo = Callable[..., NDArray[np.uint8]]


def test_64_threads_give_the_serial_answers(detector: EdgeDetector, photo: Photo) -> None:
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
def test_batches_and_streams_give_the_answers_of_run_in_order(detector: EdgeDetector, batch: int, photo: Photo) -> None:
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


def test_a_stream_left_early_stops_its_threads_and_takes_no_more(detector: EdgeDetector, photo: Photo) -> None:
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
def test_a_stream_raises_at_the_bad_item(detector: EdgeDetector, batch: int, photo: Photo) -> None:
    items: list[Any] = [photo(20, 20), photo(20, 20), np.zeros(3), photo(20, 20)]
    stream = detector.stream(items, batch=batch)
    assert next(stream) and next(stream)
    with pytest.raises(ImageError, match=r"^image 2: shape \(3,\)"):
        next(stream)
    assert not decoding_threads()
    with pytest.raises(ImageError, match=r"^image 2"):
        detector.run_batch(items)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_others_ask_can_answer(tiny_engine: Path, photo: Photo) -> None:
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


def test_an_error_of_the_iterable_waits_for_its_turn(detector: EdgeDetector, photo: Photo) -> None:
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


def test_a_batch_takes_what_is_decoded_and_waits_for_no_other(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, photo: Photo
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


def test_decoding_runs_ahead(detector: EdgeDetector, photo: Photo) -> None:
    taken: list[float] = []

    def items() -> Iterator[NDArray[np.uint8]]:
        for _ in range(8):
            taken.append(time.monotonic())
            yield photo(20, 20)

    next(detector.stream(items(), prefetch=4))
    assert 4 <= len(taken) <= 6
