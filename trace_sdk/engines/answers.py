"""What every runtime's answer goes through before anyone sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import EngineError, OutOfMemoryError

_NO_MEMORY = re.compile(r"out of memory|failed to allocate|bad.?alloc|cudaErrorMemoryAllocation", re.IGNORECASE)
ROUNDING = 1e-3  # by which fp16 may overshoot 0 or 1

Batch = TypeVar("Batch", NDArray[np.uint8], list[NDArray[np.uint8]])  # one array, or photos of several sizes
Answer = TypeVar("Answer")


def halved_once(
    run: Callable[[Batch], Answer], batch: Batch, shape: tuple[int, ...], source: str, device: str
) -> list[Answer]:
    """The answer to a batch, or to each of its halves if the device has not the memory for all of it.

    Args:
        shape: height and width that the network sees, for the message.

    Raises:
        OutOfMemoryError: not for half of it, or for one picture; says what to lower.
        EngineError: of `run`, anything else.
    """
    word = ""
    half = (len(batch) + 1) // 2
    for parts in ([batch],) if len(batch) == 1 else ([batch], [batch[:half], batch[half:]]):
        try:
            return [run(part) for part in parts]
        except EngineError as error:
            if not _NO_MEMORY.search(str(error)):
                raise
            word = str(error)
        # Here the error is gone, whose traceback held what the failed run had allocated.
    count, (height, width) = len(batch), shape
    lower = f"a smaller size (here {width}x{height} pixels)"
    if count > 1:
        lower = f"a smaller batch (here {count}, half of it was tried), or {lower}"
    raise OutOfMemoryError(f"{source}: the memory of {device} is too small. Use {lower}. It said: {word}")


def joined(answers: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One batch of several, without a copy where there is one."""
    return answers[0] if len(answers) == 1 else np.concatenate(answers)


def checked(answer: NDArray[Any], batch: NDArray[np.uint8], source: str, device: str) -> NDArray[np.float32]:
    """Edge probability float32 [B, H, W] in [0, 1] of an answer in float, or in uint8, 255 times that.

    Raises:
        EngineError: its shape is not the batch's, or it holds NaN or leaves [0, 1].
    """
    if answer.shape != batch.shape[:3]:
        raise EngineError(f"{source}: answered {answer.shape} to {batch.shape}. Export it again.")
    if answer.dtype == np.uint8:
        return answer.astype(np.float32) / np.float32(255)
    check_range(float(answer.min()), float(answer.max()), source, device)
    clipped: NDArray[np.float32] = np.clip(answer, 0.0, 1.0, dtype=np.float32)
    return clipped


def check_range(low: float, high: float, source: str, device: str) -> None:
    """Raises EngineError if an answer's smallest or largest value is NaN or leaves [0, 1]."""
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise EngineError(
            f"{source}: answered values from {low} to {high} on {device}, expected [0, 1]. "
            "Export it again at a higher precision."
        )
