"""trace-sdk combine: a student with a backbone and a convolutional one, as one."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output
from trace_sdk.cli.photos import check_new
from trace_sdk.errors import ArgumentError


@click.command()
@click.argument("attending", type=click.Path(path_type=Path), metavar="STUDENT")
@click.argument("looking", type=click.Path(path_type=Path), metavar="NANO")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the combined student.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Weight of NANO; more where it is better.",
)
def command(attending: Path, looking: Path, out: Path, share: float) -> None:
    """Combine what `trace-sdk distill` and `distill-nano` (or `self-train`) wrote: the mean of their log-odds.

    STUDENT reads attention, of the image at half its size; NANO looks at the image itself. So the size is twice that
    of STUDENT, and an answer takes little more time. The threshold lies between theirs. To train further, train the
    two and combine them again.

    \b
      trace-sdk combine runs/student runs/nano -o runs/both
    Next:
      trace-sdk export runs/both -o mine.onnx
    """
    from trace_sdk.student.combined import CombinedStudent
    from trace_sdk.student.folder import open_student
    from trace_sdk.student.model import Student
    from trace_sdk.student.nano import NanoStudent

    check_new(out, attending, looking)
    student, nano = open_student(attending), open_student(looking)
    if not isinstance(student, Student):
        raise ArgumentError(f"{attending} has no backbone of its own. Give first what `trace-sdk distill` wrote.")
    if not isinstance(nano, NanoStudent):
        raise ArgumentError(
            f"{looking} is not a convolutional student. Give second what `trace-sdk distill-nano` wrote."
        )
    CombinedStudent(student, nano, share).save(out, {})
    output.print(f"Student written to {out}", markup=False, soft_wrap=True)
