"""One thread for all work of an engine on a GPU: CUDA's current device and captured graphs belong to a thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from trace_sdk.errors import DeviceError

T = TypeVar("T")


class GpuThread:
    """Runs what it is given, one after another, in one thread; callers of any thread wait for their answer.

    The thread ends with the object.
    """

    def __init__(self, source: str) -> None:
        """`source`: the engine's name for messages."""
        self._source, self._process = source, os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trace-gpu")

    def __call__(self, work: Callable[[], T]) -> T:
        """What `work` answers or raises.

        Raises:
            DeviceError: this process was forked after the engine was opened: CUDA does not survive that.
        """
        if os.getpid() != self._process:
            raise DeviceError(
                f"{self._source}: was opened before this process was forked, and CUDA does not work in a fork. Open "
                "the engine in each process, or start processes with multiprocessing's 'spawn'."
            )
        return self._pool.submit(work).result()
