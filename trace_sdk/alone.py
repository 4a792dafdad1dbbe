"""One process at a time that works in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_sdk.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Hold a folder that exists while the block runs; a process that is killed lets go of it, and no file stays behind.

    Gives whether it is held: where there are no locks, nobody knows who else works there.

    Raises:
        OutputError: another process holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor, held = os.open(folder, os.O_RDONLY), False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise OutputError(
                f"Another process is writing to {folder}. Wait until it ends, or give another folder (-o)."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield held
    finally:
        if held:  # not by closing alone: forks, as those that prepare batches, have the descriptor, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
