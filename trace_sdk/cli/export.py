"""trace-sdk export: a student as an engine file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from trace_sdk.cli.console import output, status


@click.command("export", short_help="Turn a student into one ONNX engine file, checked against PyTorch.")
@click.argument("student", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The engine file, ending in .onnx.")
@click.option("--name", help="Name the engine gives itself.  [default: the file's]")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32", "int8"]),
    default="fp16",
    show_default=True,
    help="fp16, fp32: of the stored weights, arithmetic is fp32. int8: weights and arithmetic, where answers allow it.",
)
@click.option(
    "--calibrate",
    "photos",
    metavar="PHOTOS",
    type=click.Path(path_type=Path, exists=True),
    help="For int8: a folder of photos like those the engine will see, 20 or more.",
)
@click.option(
    "--calibration",
    type=click.Choice(["entropy", "percentile", "minmax"]),
    default="entropy",
    show_default=True,
    help="For int8: how the range of values is chosen.",
)
@click.option(
    "--default-size",
    default=448,
    show_default=True,
    help="Longest side in px that the network sees unless told otherwise.",
)
@click.option(
    "--quality",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON of figures to keep in the file.",
)
def command(
    student: Path,
    out: Path,
    name: str | None,
    precision: str,
    photos: Path | None,
    calibration: str,
    default_size: int,
    quality: Path | None,
) -> None:
    """Write STUDENT as one .onnx file: weights and metadata inside, any size, any batch.

    The exported graph is run at sizes and batches it was not exported with; if an answer differs from PyTorch's
    by more than 1e-4, nothing is written. The file is sealed with its sha256, which is checked at every load.
    OUT.json beside it holds the report that is shown.

    With int8, layers that change the edges too much stay in fp16. Which, is measured on photos that took no part
    in the calibration.

    \b
      trace-sdk export runs/student -o mine.onnx
      trace-sdk export runs/student -o mine-int8.onnx --precision int8 --calibrate photos/
      trace-sdk info mine.onnx
      trace-sdk benchmark mine.onnx mine-int8.onnx
      trace-sdk detect photo.jpg --engine mine.onnx -o edges/
    """
    from trace_sdk.export.onnx import export_onnx
    from trace_sdk.pretraining.training_images import list_photos
    from trace_sdk.student.model import Student

    with status("export") as note:
        report = export_onnx(
            Student.load(student),
            out,
            name=name or out.stem,
            precision=precision,
            default_size=default_size,
            photos=list_photos([photos]) if photos else (),
            calibration=calibration,
            quality=json.loads(quality.read_text()) if quality else None,
            note=note,
        )
    record = report.save(out)
    output.print(report.to_table())
    output.print(f"Written: {out}, {record}", markup=False, soft_wrap=True)
