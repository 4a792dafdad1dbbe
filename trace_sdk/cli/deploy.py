"""`trace-sdk deploy`: folders that inference servers load."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output
from trace_sdk.cli.detect import numbers


@click.group()
def command() -> None:
    """Write what an inference server loads."""


@command.command(short_help="Write a model repository for the Triton Inference Server.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--engine", help="An .onnx or TensorRT .engine file, or a bundled name.  [default: trace-small]")
@click.option("--max-batch", default=8, show_default=True, help="The most photos that go through the engine together.")
@click.option(
    "--buckets",
    metavar="N,N,...",
    help="Clients scale and pad to these lengths of sides, in pixels; the server is ready once it has run each shape.",
)
@click.option(
    "--output",
    "answers",
    type=click.Choice(["float32", "float16", "uint8"]),
    help="Without --buckets, what the server answers: probabilities, or uint8, 255 times that.  [default: float32]",
)
@click.option(
    "--encoded",
    is_flag=True,
    help="Also write NAME-photo, which takes JPEG, PNG and other files; the server's Python needs trace-sdk.",
)
def triton(
    folder: Path, engine: str | None, max_batch: int, buckets: str | None, answers: str | None, encoded: bool
) -> None:
    """Write a model repository for the Triton Inference Server into DIR: for its onnxruntime backend, or, of a TensorRT
    .engine file, for its TensorRT backend.

    \b
    Examples:
      trace-sdk deploy triton models/
      trace-sdk deploy triton models/ --output uint8 --encoded
      trace-sdk deploy triton models/ --engine mine.onnx --buckets 256,352,448
      trace-sdk deploy triton models/ --engine mine.engine --buckets 256,352,448
      tritonserver --model-repository=models/

    Clients send RGB photos of any size and get edges at that size: scaling is in the graph. Requests of one shape are
    batched; where photos of many sizes come together, --buckets leaves scaling and padding to clients, so that they
    share a few shapes. With --encoded clients may send files: the server decodes, scales and pads, in its Python.
    examples/triton has a client.
    """
    from trace_sdk.serving.triton import write_repository

    written = write_repository(
        engine,
        folder,
        max_batch=max_batch,
        buckets=numbers(buckets),
        output=answers,
        encoded=encoded,
        note=lambda text: output.print(text, markup=False, soft_wrap=True),
    )
    needs = " by a server whose Python has trace-sdk" if encoded else ""
    output.print(
        f"Written: {written}. Serve it{needs}: tritonserver --model-repository={folder}", markup=False, soft_wrap=True
    )
