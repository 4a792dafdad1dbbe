"""Files that appear whole or not at all: temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from trace_sdk.alone import alone
from trace_sdk.errors import OutputError

_UNFINISHED = ".tmp"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """An empty file to write to, that takes the place of `path` only when the block ends without an error.

    Missing parent folders are made. On any error, Ctrl-C included, the temporary file is removed
    and an older file at `path` is left as it was.

    Raises:
        OutputError: the folder is missing and cannot be made, is read-only, or the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f"{_hidden(target)}.", suffix=_UNFINISHED)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        os.close(descriptor)
        yield Path(name)
        with Path(name).open("rb") as written:
            os.fsync(written.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def write_whole(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the place of `path` as `whole_file` says, and raises like it."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        yield file


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises OutputError like `write_whole`."""
    with write_whole(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all. Raises OutputError like `write_whole`."""
    write_bytes(path, text.encode())


def make_folder(folder: str | Path) -> None:
    """Make a folder that a long job will write to, so that it fails before the work. Raises OutputError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(Path(folder), error) from error


def remove(path: str | Path) -> None:
    """Remove a file, if it is there. Raises OutputError like `write_whole`."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(Path(path), error) from error


def remove_unfinished(targets: Iterable[Path], untouched: float = 0) -> None:
    """Remove the temporary files that killed writers of these files left beside them.

    Args:
        untouched: seconds since the last write to one, where another process may still be writing.

    Raises:
        OutputError: one cannot be removed.
    """
    hidden: dict[Path, set[str]] = defaultdict(set)
    for target in targets:
        hidden[target.parent].add(_hidden(target))
    for folder, names in hidden.items():
        for file in folder.glob(f".*{_UNFINISHED}"):
            with suppress(FileNotFoundError):  # another process removed it
                if file.name.rsplit(".", 2)[0] in names and time.time() - file.stat().st_mtime >= untouched:
                    remove(file)


@contextmanager
def unfinished_folder(path: str | Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, for what becomes `path` when it is done; removed when the block ends.

    Missing parent folders are made. Folders that killed processes left for the same `path` are removed first.

    Raises:
        OutputError: what happens in the block cannot be written, or the folder not made.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*/"):
            with suppress(OSError, OutputError), alone(left):  # unless a process still works there
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder, alone(Path(folder)):
            yield Path(folder)
    except OSError as error:
        raise cannot_write(target, error) from error


def cannot_write(target: Path, error: OSError) -> OutputError:
    """What to raise where the system refuses a file or a folder."""
    reason = error.strerror or str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = next((f"{file} is a file" for file in (target, *target.parents) if file.is_file()), reason)
    return OutputError(f"Cannot write {target}: {reason}. Choose a folder that exists, is writable and has room (-o).")


def _hidden(target: Path) -> str:
    """How the name of a file's temporary one begins; cut, lest all of it be longer than the 255 bytes allowed."""
    in_bytes = os.fsencode(target.name)
    return f".{target.name if len(in_bytes) <= 240 else in_bytes[:240].decode(errors='ignore')}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once the folder itself is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
