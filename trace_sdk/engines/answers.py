"""What every runtime's answer goes through before anyone sees it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import EngineError

_NO_MEMORY = re.compile(r"out of memory|failed to allocate|bad.?alloc|cudaErrorMemoryAllocation", re.IGNORECASE)
ROUNDING = 1e-3  # by which fp16 may overshoot 0 or 1


def halved_once(run: Callable[[NDArray[np.uint8]], NDArray[Any]], batch: NDArray[np.uint8]) -> NDArray[Any]:
    """The answers to a batch, in two halves if the device has not the memory for all of it.

    Raises:
        EngineError: of `run`, also if half of it is too large.
    """
    try:
        return run(batch)
    except EngineError as error:
        if len(batch) == 1 or not _NO_MEMORY.search(str(error)):
            raise
    # Here and not above: the error's traceback holds what the failed run had allocated.
    middle = len(batch) // 2
    return np.concatenate([run(batch[:middle]), run(batch[middle:])])


def checked(answer: NDArray[Any], batch: NDArray[np.uint8], source: str, device: str) -> NDArray[np.float32]:
    """Edge probability float32 [B, H, W] in [0, 1] of an answer in float, or in uint8, 255 times that.

    Raises:
        EngineError: its shape is not the batch's, or it holds NaN or leaves [0, 1].
    """
    if answer.shape != batch.shape[:3]:
        raise EngineError(f"{source}: answered {answer.shape} to {batch.shape}. Export it again.")
    if answer.dtype == np.uint8:
        return answer.astype(np.float32) / np.float32(255)
    low, high = float(answer.min()), float(answer.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise EngineError(
            f"{source}: answered values from {low} to {high} on {device}, expected [0, 1]. "
            "Export it again at a higher precision."
        )
    clipped: NDArray[np.float32] = np.clip(answer, 0.0, 1.0, dtype=np.float32)
    return clipped
