"""A student's folder, whichever architecture it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent

AnyStudent: TypeAlias = Student | NanoStudent


def open_student(folder: str | Path) -> AnyStudent:
    """What `trace-sdk distill` or `distill-nano` wrote; `student.json` says which.

    Raises:
        CheckpointError: a part is missing or corrupt.
    """
    try:
        architecture = json.loads((Path(folder) / "student.json").read_text()).get("architecture")
    except (OSError, ValueError, AttributeError):
        architecture = None  # Student.load says what is wrong
    return NanoStudent.load(folder) if architecture == "nano" else Student.load(folder)
