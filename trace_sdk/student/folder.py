"""A student's folder, whichever architecture it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from trace_sdk.student.combined import CombinedStudent
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent

AnyStudent: TypeAlias = Student | NanoStudent | CombinedStudent


def open_student(folder: str | Path) -> AnyStudent:
    """What `trace-sdk distill`, `distill-nano`, `self-train` or `combine` wrote; `student.json` says which.

    Raises:
        CheckpointError: a part is missing or corrupt.
    """
    try:
        architecture = json.loads((Path(folder) / "student.json").read_text()).get("architecture")
    except (OSError, ValueError, AttributeError):
        architecture = None  # Student.load says what is wrong
    kinds: dict[str | None, type[NanoStudent | CombinedStudent]] = {"nano": NanoStudent, "combined": CombinedStudent}
    return kinds[architecture].load(folder) if architecture in kinds else Student.load(folder)
