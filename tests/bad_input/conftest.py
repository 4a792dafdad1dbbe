from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_sdk import EdgeDetector

SECONDS = 2.0


@pytest.fixture(scope="session")
def detector(tiny_engine: Path) -> EdgeDetector:
    return EdgeDetector(tiny_engine)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start <= SECONDS
