"""A student's folder, whichever architecture it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from trace_sdk.errors import CheckpointError
from trace_sdk.student.combined import CombinedStudent
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.record import is_student, read_record

AnyStudent: TypeAlias = Student | NanoStudent | CombinedStudent


def open_student(folder: str | Path) -> AnyStudent:
    """What `trace-sdk distill`, `distill-nano`, `self-train` or `combine` wrote; `student.json` says which.

    Raises:
        CheckpointError: it holds no student, or a part is missing or corrupt.
    """
    if not is_student(Path(folder)):
        wrong = "holds no student" if Path(folder).exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {wrong}. Give the folder that `trace-sdk distill`, `distill-nano`, `self-train` or `combine` "
            "wrote."
        )
    try:
        architecture = read_record(Path(folder)).get("architecture")
    except (OSError, ValueError, TypeError):
        architecture = None  # Student.load says what is wrong
    kinds: dict[str | None, type[NanoStudent | CombinedStudent]] = {"nano": NanoStudent, "combined": CombinedStudent}
    return kinds[architecture].load(folder) if architecture in kinds else Student.load(folder)
