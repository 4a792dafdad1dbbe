"""The loop that pretraining and distillation share: batches prepared ahead, the state saved in time and on Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from trace_sdk.alone import alone
from trace_sdk.atomic import make_folder, remove_unfinished
from trace_sdk.errors import ArgumentError, TraceError
from trace_sdk.training.history import History
from trace_sdk.training.processes import process_index
from trace_sdk.training.state import STATE

Batch = TypeVar("Batch")

Report = Callable[[int, dict[str, float]], None]
"""Called after each step with the steps done and the loss terms."""


class Trainer(Protocol[Batch]):
    """What is trained, how far it is, and how it is kept."""

    step: int

    def batch(self, step: int) -> Batch:
        """What `step` learns from; depends on the seed and the step alone, so that a resumed run sees the same."""

    def train(self, batch: Batch) -> dict[str, float]:
        """One optimizer step: raises `step` by one and returns the loss terms."""

    def save(self, file: Path) -> None:
        """Write the state, whole or not at all."""

    def restore(self, file: Path) -> None:
        """Read what `save` wrote."""


def train_until(
    steps: int, trainer: Trainer[Batch], out: Path, save_seconds: float, report: Report, workers: int = 0
) -> None:
    """Train until `steps` are done, going on from the state in `out` if a run was cut there.

    The state and the curves (`curves.csv`, drawn in `curves.png` when it ends) are saved every `save_seconds`, on
    Ctrl-C and at the end, by process 0 alone where several train as one. Ctrl-C waits for the end of the step; a second
    one does not, and what was saved last is then where the next run goes on.

    Args:
        workers: processes that prepare batches; 0 prepares the next one in a thread, enough for a CPU's pace.

    Raises:
        ArgumentError: `workers` is negative.
        OutputError: `out` cannot be written to, or another process is writing there.
    """
    if workers < 0:
        raise ArgumentError(f"workers must be at least 0, got {workers}.")
    make_folder(out)
    with alone(out) if process_index() == 0 else nullcontext():
        _train(steps, trainer, out, save_seconds, report, workers)


def _train(steps: int, trainer: Trainer[Batch], out: Path, save_seconds: float, report: Report, workers: int) -> None:
    file, history = out / STATE, History(out)
    if process_index() == 0:
        remove_unfinished([file])
    if file.is_file():
        trainer.restore(file)
        history.restore(trainer.step)

    def save() -> None:
        if process_index() == 0:
            history.save()  # first: rows of steps that the state does not have yet are cut off, missing ones are lost
            trainer.save(file)

    saved, whole = time.monotonic(), True
    try:
        for batch in batches_ahead(trainer, steps, workers):
            with ctrl_c_waits():
                whole = False
                losses = trainer.train(batch)
                history.add(trainer.step, losses)
                whole = True
            report(trainer.step, losses)
            if time.monotonic() - saved >= save_seconds:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        if whole:  # a step half done is nothing to go on from
            save()
        raise
    save()
    if process_index() == 0:
        history.plot()


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C comes through at the end of the block, a second one at once; there is none outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def wait(*_: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    except Exception:
        if came:  # compilers and other processes that the block waits for got it, too, and broke off
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def batches_ahead(trainer: Trainer[Batch], steps: int, workers: int) -> Iterator[Batch]:
    """Every batch from the trainer's step up to `steps`, prepared while the ones before are learnt from."""
    if workers:
        # Forked, so that photos, labels and cut-outs that were read before are shared rather than sent.
        for prepared in DataLoader(
            _Batches(trainer.batch, steps),
            batch_size=None,
            sampler=range(trainer.step, steps),
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
        ):
            if isinstance(prepared, TraceError):
                raise prepared
            yield prepared
        return
    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(trainer.batch, trainer.step)
        for step in range(trainer.step, steps):
            batch = upcoming.result()
            upcoming = loader.submit(trainer.batch, step + 1)
            yield batch


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """The batches by number, as worker processes ask for them."""

    batch: Callable[[int], Any]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batch(step)
        except TraceError as error:
            return error  # raised there: torch would write the worker's traceback into it


def _as_it_is(batch: Any) -> Any:
    return batch
