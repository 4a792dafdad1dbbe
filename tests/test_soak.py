"""Memory stays where it is over many answers. TRACE_SOAK=20000 makes it long, TRACE_SOAK_ENGINE=trace-small real."""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from trace_sdk import EdgeDetector
from trace_sdk.errors import ImageError

ANSWERS = int(os.environ.get("TRACE_SOAK", "1000"))
ENGINE = os.environ.get("TRACE_SOAK_ENGINE")
ALLOWED = 8 << 20  # bytes; the tables and pools of an allocator breathe

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"),
    pytest.mark.timeout(300 + ANSWERS),
]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def jpegs() -> list[bytes]:
    """Photos of ten shapes."""
    rng = np.random.default_rng(0)
    encoded = []
    for number in range(10):
        file = io.BytesIO()
        rough = PIL.Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        rough.resize((120 + 17 * number, 300 - 19 * number)).save(file, "JPEG")
        encoded.append(file.getvalue())
    return encoded


def rounds(detector: EdgeDetector, photos: list[bytes], answers: int) -> Iterator[None]:
    """One photo in three ways and one that is damaged, again and again."""
    for number in range(answers // 4):
        photo = photos[number % len(photos)]
        detector.run(photo).thin()
        list(detector.stream([photo, photo], batch=2))
        with pytest.raises(ImageError):
            detector.run(photo[: len(photo) // 2])
        yield


@pytest.mark.parametrize("buckets", [None, (64, 128)])
def test_memory_does_not_grow(buckets: tuple[int, ...] | None, tiny_engine: Path) -> None:
    detector = EdgeDetector(ENGINE or tiny_engine, size=128, buckets=buckets)
    photos = jpegs()
    for _ in rounds(detector, photos, ANSWERS // 3):  # every shape, so that pools are full
        pass
    before = resident()
    for _ in rounds(detector, photos, ANSWERS):
        pass
    assert resident() - before < ALLOWED


def test_opening_and_closing_detectors_gives_memory_back(tiny_engine: Path) -> None:
    picture = np.zeros((64, 64), np.uint8)
    for _ in range(5):
        EdgeDetector(tiny_engine).run(picture)
    before = resident()
    for _ in range(20):
        EdgeDetector(tiny_engine).run(picture)
    assert resident() - before < ALLOWED
