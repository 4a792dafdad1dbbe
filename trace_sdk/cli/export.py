"""trace-sdk export: a student as an engine file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trace_sdk.atomic import write_bytes
from trace_sdk.cli.console import output, status
from trace_sdk.engines import BUNDLED, read_engine
from trace_sdk.errors import ArgumentError


@click.command()
@click.argument("source", metavar="STUDENT|ENGINE")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The engine file: .onnx, or .engine with --runtime.",
)
@click.option("--name", help="Name the engine gives itself.  [default: the file's]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "fp16-mixed", "bf16", "int8"]),
    default="fp16",
    show_default=True,
    help="fp32, fp16: of the stored weights, arithmetic is fp32. fp16-mixed, bf16: products in 16 bits, for GPUs. "
    "int8: weights and arithmetic. The last three where answers allow it.",
)
@click.option(
    "--calibrate",
    "photos",
    metavar="PHOTOS",
    type=click.Path(path_type=Path, exists=True),
    help="For int8, on request for 16-bit products: a folder of photos like those the engine will see, 20 or more.",
)
@click.option(
    "--calibration",
    type=click.Choice(["entropy", "percentile", "minmax"]),
    default="entropy",
    show_default=True,
    help="For int8: how the range of values is chosen.",
)
@click.option(
    "--evaluate",
    "annotated",
    metavar="DATA",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A data set as `trace-sdk evaluate` takes it, to tell by how much ODS changes.  [default: drawn scenes]",
)
@click.option(
    "--default-size",
    type=int,
    help="Longest side in px that the network sees unless told otherwise.  [default: what the student was made for: "
    "448 on the pixel backbone, 512 of nano, a latent model's own size; twice that of a combined one]",
)
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    help="Build ENGINE, an .onnx file, for TensorRT-RTX (needs no GPU) or for TensorRT on the GPU of this machine.",
)
@click.option(
    "--any-size", is_flag=True, help="Put scaling, padding and cropping into the graph: photos go in as they are."
)
@click.option(
    "--output",
    "answers",
    type=click.Choice(["float32", "float16", "uint8"]),
    default="float32",
    show_default=True,
    help="With --any-size, what the graph answers: probabilities, or uint8, 255 times that.",
)
@click.option(
    "--quality",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON of figures to keep in the file.",
)
def command(
    source: str,
    out: Path,
    name: str | None,
    precision: str,
    photos: Path | None,
    calibration: str,
    annotated: Path | None,
    default_size: int | None,
    runtime: str | None,
    any_size: bool,
    answers: str,
    quality: Path | None,
) -> None:
    """Write STUDENT as one .onnx file: weights and metadata inside, any batch.

    The exported graph is run at sizes and batches it was not exported with; if an answer differs from PyTorch's
    by more than 1e-4, nothing is written. The file is sealed with its sha256, which is checked at every load.
    OUT.json beside it holds the report that is shown.

    With --any-size the graph takes photos as they are and answers at their size, within 1e-3 of what EdgeDetector
    does around the other engines: for clients that are not Python. It can also be made of an engine that exists.

    With int8, layers that change the edges too much stay in fp16. Which, is measured on photos that took no part
    in the calibration. With fp16-mixed and bf16 such products stay in fp32, and so do softmax, norms and sums. The
    report tells ODS before and after; on DATA, a fall of more than 0.002 (fp16) or 0.01 (bf16, int8) stops the export.

    \b
      trace-sdk export runs/student -o mine.onnx
      trace-sdk export runs/student -o mine-int8.onnx --precision int8 --calibrate photos/
      trace-sdk export runs/student -o mine-gpu.onnx --precision fp16-mixed --evaluate bsds/
      trace-sdk export mine.onnx -o mine-any-size.onnx --any-size --output uint8
      trace-sdk export mine.onnx -o mine.engine --runtime tensorrt-rtx
      trace-sdk info mine.onnx
      trace-sdk benchmark mine.onnx mine-int8.onnx
      trace-sdk detect photo.jpg --engine mine.onnx -o edges/
    """
    from trace_sdk.export.any_size import take_any_size
    from trace_sdk.export.tensorrt import build

    if not Path(source).is_dir() and (source in BUNDLED or Path(source).suffix == ".onnx"):
        if any_size == bool(runtime):
            raise click.UsageError(f"{source} is an engine already; --any-size or --runtime makes another of it.")
        taken = {"source", "out"} | ({"runtime"} if runtime else {"any_size", "answers"})
        context = click.get_current_context()
        left = [
            option.opts[-1]
            for option in context.command.params
            if option.name
            and option.name not in taken
            and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        ]
        if left:
            raise click.UsageError(
                f"{source} is an engine already; give {', '.join(left)} when its student is exported."
            )
        engine, named = read_engine(source)
        with status("export") as note:
            if runtime:
                write_bytes(out, build(engine, named, runtime, note=note))
            else:
                note("putting scaling into the graph")
                write_bytes(out, take_any_size(engine, named, output=answers))
        output.print(f"Written: {out}", markup=False, soft_wrap=True)
        return
    if Path(source).is_file():
        raise click.UsageError(f"{source} is neither a student's folder nor an .onnx engine.")
    if runtime:
        raise click.UsageError("--runtime builds an .onnx engine further: export the student to one first.")
    given = click.get_current_context().get_parameter_source("calibration")
    if precision != "int8" and given is ParameterSource.COMMANDLINE:
        raise click.UsageError("--calibration is for --precision int8.")
    from trace_sdk.export.onnx import export_onnx
    from trace_sdk.pretraining.photos import list_photos
    from trace_sdk.student.folder import open_student

    with status("export") as note:
        report = export_onnx(
            open_student(source),
            out,
            name=name or out.stem,
            precision=precision,
            default_size=default_size,
            photos=list_photos([photos]) if photos else (),
            calibration=calibration,
            annotated=annotated,
            any_size=any_size,
            output=answers,
            quality=_figures(quality) if quality else None,
            note=note,
        )
    record = report.save(out)
    output.print(report.to_table())
    output.print(f"Written: {out}, {record}", markup=False, soft_wrap=True)


def _figures(file: Path) -> dict[str, Any]:
    """What --quality holds."""
    try:
        figures = json.loads(file.read_bytes())
    except ValueError as error:
        raise ArgumentError(f"{file} is not JSON ({error}). Give an object of figures (--quality).") from error
    if not isinstance(figures, dict):
        raise ArgumentError(f"{file} holds no JSON object. Give one of figures, {{name: figure}} (--quality).")
    return figures
