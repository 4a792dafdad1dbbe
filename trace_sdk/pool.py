"""Jobs in processes, or at once where one worker is enough."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from trace_sdk.errors import OutOfMemoryError

Answer = TypeVar("Answer")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def job_pool(job: Callable[..., Answer], workers: int) -> Iterator[Callable[..., Future[Answer]]]:
    """A function like `job`, which a module must hold, that answers with a future.

    Several workers compute with one thread each, unless the environment says otherwise: else those of one wait for the
    other's. Refining with two workers on two cores then takes two fifths of the time.
    """
    if workers == 1:

        def at_once(*arguments: Any) -> Future[Answer]:
            future: Future[Answer] = Future()
            future.set_result(job(*arguments))
            return future

        yield at_once
        return
    unset = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))  # workers start at their first job, and read it then
    # Forking a process that runs onnxruntime's threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin)
    try:
        yield lambda *arguments: pool.submit(job, *arguments)
    except BrokenProcessPool as error:
        raise OutOfMemoryError(
            "A worker process was killed, as the system does when memory runs out. Give fewer --workers, and run it "
            "again to go on."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        for name in unset:
            os.environ.pop(name, None)


def _begin() -> None:
    """In a worker: Ctrl-C reaches all processes of a terminal; the first says what was done, and workers end with it.

    With one that is killed, too, for which they would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with, daemon=True).start()
