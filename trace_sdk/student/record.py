"""`student.json`, the record of a student's folder: what the folder holds, and how it was made. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_sdk.atomic import remove, write_text

RECORD = "student.json"


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student; not one that may not be looked into: reading it says so."""
    try:
        return (folder / RECORD).is_file()
    except OSError:  # or a name that is too long
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """What `recorded` wrote. Raises OSError or ValueError if it cannot be read."""
    return dict(json.loads((folder / RECORD).read_text()))


@contextmanager
def recorded(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """The block writes the parts of a student; meanwhile the folder holds none: parts of two students are no student.

    Raises:
        OutputError: the folder cannot be written to.
    """
    remove(folder / RECORD)
    yield
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
