"""Jobs in processes, or at once where one worker is enough."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Answer = TypeVar("Answer")


@contextmanager
def job_pool(job: Callable[..., Answer], workers: int) -> Iterator[Callable[..., Future[Answer]]]:
    """A function like `job`, which a module must hold, that answers with a future."""
    if workers == 1:

        def at_once(*arguments: Any) -> Future[Answer]:
            future: Future[Answer] = Future()
            future.set_result(job(*arguments))
            return future

        yield at_once
        return
    # Forking a process that runs onnxruntime's threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield lambda *arguments: pool.submit(job, *arguments)
    finally:
        pool.shutdown(cancel_futures=True)
