"""trace-sdk export: a student as an engine file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from trace_sdk.cli.console import output


@click.command("export", short_help="Turn a student into one ONNX engine file, checked against PyTorch.")
@click.argument("student", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The engine file, ending in .onnx.")
@click.option("--name", help="Name the engine gives itself.  [default: the file's]")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of the stored weights; arithmetic is fp32.",
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
    student: Path, out: Path, name: str | None, precision: str, default_size: int, quality: Path | None
) -> None:
    """Write STUDENT as one .onnx file: weights and metadata inside, any size, any batch.

    The exported graph is run at sizes and batches it was not exported with; if an answer differs from PyTorch's
    by more than 1e-4, nothing is written. The file is sealed with its sha256, which is checked at every load.

    \b
      trace-sdk export runs/student -o mine.onnx
      trace-sdk info mine.onnx
      trace-sdk detect photo.jpg --engine mine.onnx
    """
    from trace_sdk.export.onnx import export_onnx
    from trace_sdk.student.model import Student

    manifest = export_onnx(
        Student.load(student),
        out,
        name=name or out.stem,
        precision=precision,
        default_size=default_size,
        quality=json.loads(quality.read_text()) if quality else None,
    )
    worst = max(manifest.parity.values())
    output.print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {precision} weights, largest difference from PyTorch {worst:.1g}"
    )
