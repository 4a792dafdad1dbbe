"""What every command shares: the terminal, progress, and how an error becomes a line and an exit code."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trace_sdk.errors import ArgumentError, TraceError

ALL_DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PLAIN_LINE_EVERY = 30.0  # seconds between two lines of progress in a log

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)

_TRAIN = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "peft",
    "safetensors",
    "onnx",
    "onnxscript",
    "matplotlib",
)
_EVALUATE = ("scipy", "skimage", "pycocotools")
_EXTRAS = {**dict.fromkeys(_TRAIN, "train"), **dict.fromkeys(_EVALUATE, "evaluate")}


def write_what_can_be() -> None:
    """Let stdout replace what its encoding lacks: a pipe on Windows takes neither → nor μ."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def say_error(message: object) -> None:
    """Print `error: message` to stderr, above a running progress bar."""
    errors.print(f"error: {message}", style="red", markup=False, soft_wrap=True)


class BadEntries:
    """What a command does with an entry that cannot be used: raise the error, or with --skip-bad say it and go on."""

    def __init__(self, skip: bool) -> None:
        self._skip, self.count = skip, 0

    def __call__(self, error: TraceError) -> None:
        if not self._skip:
            raise type(error)(f"{error} Or pass --skip-bad.") from error
        self.count += 1
        say_error(error)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn what goes wrong inside the block into one line on stderr and an exit code.

    TraceError exits 1 (ArgumentError 2, as any wrong usage), Ctrl-C 130 with the line to go on with.
    """
    try:
        yield
    except ArgumentError as error:
        say_error(error)
        raise click.exceptions.Exit(USAGE) from None
    except TraceError as error:
        say_error(error)
        raise click.exceptions.Exit(FAILED) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        say_error(f'{package} is not installed. Run: pip install "trace-sdk[{_EXTRAS[package]}]"')
        raise click.exceptions.Exit(FAILED) from None
    except OSError as error:
        # Files that we write have their own errors; what is left without a name is the standard output.
        if error.errno not in (ENOSPC, EDQUOT, EFBIG, EIO) or error.filename is not None:
            raise
        say_error(f"The standard output cannot be written ({error.strerror}). Make room, or send it elsewhere.")
        raise click.exceptions.Exit(FAILED) from None
    except KeyboardInterrupt:
        script = sys.argv[0].endswith(".py")
        quoted = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        command = quoted([*(["python", sys.argv[0]] if script else [Path(sys.argv[0]).name]), *sys.argv[1:]])
        errors.print(f"interrupted. To go on, run: {command}", markup=False, soft_wrap=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def run_script(main: Callable[[], None]) -> None:
    """Do what a script of `recipes/` does, with a command's errors and exit codes."""
    try:
        with report_errors():
            main()
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)


def at_least(least: int) -> Callable[[str], int]:
    """The type of such a script's argument that is a whole number from `least` on."""
    from argparse import ArgumentTypeError

    def number(text: str) -> int:
        if int(text) < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


class Advance(Protocol):
    """Tells the progress bar that `steps` more are done; `note` is shown beside it (a loss, a name)."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int, done: int = 0, unit: str | None = None) -> Iterator[Advance]:
    """A progress bar on stderr, or one plain line every 30 s and at the end where stderr is not a terminal.

        with progress("label", total=len(photos)) as advance:
            for photo in photos:
                ...
                advance(note=photo.name)

    `done` is where a resumed job stands already. With a `unit` its rate is shown, and the time left in a log.
    """
    with (_bar if errors.is_terminal else _lines)(description, total, done, unit) as advance:
        yield advance


@contextmanager
def _bar(description: str, total: int, done: int, unit: str | None) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(description, total=total, completed=done, note="", rate="")
        pace = _Pace(unit)

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note, rate=pace.add(steps))

        yield advance


@contextmanager
def _lines(description: str, total: int, done: int, unit: str | None) -> Iterator[Advance]:
    last = time.monotonic()
    pace = _Pace(unit)

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        rate = pace.add(steps)
        if done >= total or time.monotonic() - last >= PLAIN_LINE_EVERY:
            last = time.monotonic()
            left = f", {timedelta(seconds=round(pace.seconds(total - done)))} left," if rate and done < total else ""
            line = " ".join(filter(None, (f"{description}: {done}/{total}", rate + left, note)))
            errors.print(line, markup=False, soft_wrap=True)

    yield advance


class _Pace:
    """How fast a job goes since it was started or resumed."""

    def __init__(self, unit: str | None) -> None:
        self._unit, self._start, self._done = unit, time.monotonic(), 0

    def add(self, steps: int) -> str:
        """The rate with `steps` more done, "" without a unit."""
        self._done += steps
        return f"{self._done / max(time.monotonic() - self._start, 1e-9):.2f} {self._unit}/s" if self._unit else ""

    def seconds(self, steps: int) -> float:
        """That `steps` more take at this rate."""
        return (time.monotonic() - self._start) / max(self._done, 1) * steps


@contextmanager
def status(description: str) -> Iterator[Callable[[str], None]]:
    """For work of unknown length: what is being done, on one line that changes, or a line every 30 s in a log.

    with status("export") as note:
        note("tracing the graph")
    """
    last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_LINE_EVERY:
            last = time.monotonic()
            errors.print(f"{description}: {text}", markup=False, soft_wrap=True)

    if not errors.is_terminal:
        yield line
        return
    with errors.status(description) as spinner:
        yield lambda text: spinner.update(f"{description}: {escape(text)}")
