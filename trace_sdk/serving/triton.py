"""A model repository for the Triton Inference Server: the engine file and a config.pbtxt beside it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.detector import EdgeDetector
from trace_sdk.engines import ON_GPU, read_engine
from trace_sdk.engines.manifest import ANY_SIZE
from trace_sdk.errors import ArgumentError, OutputError

QUEUE_DELAY = 2000  # µs that a request may wait for others of its shape
QUEUE_LENGTH = 256  # requests that may wait; more are refused at once


def write_repository(
    engine: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    max_batch: int = 8,
    buckets: Sequence[int] | None = None,
    output: str = "float32",
) -> Path:
    """Write FOLDER/NAME/1/model.onnx and FOLDER/NAME/config.pbtxt for the onnxruntime backend.

    Clients send `image` uint8 [batch, height, width, 3] RGB and get `edge_probability` [batch, height, width]. Without
    `buckets` they send photos as they are: scaling is in the graph (`trace_sdk.export.any_size`, which needs the onnx
    package unless the engine has it already). With `buckets` they scale and pad to those sides, so that photos of
    different sizes share few shapes. The server batches requests of one shape, and runs on a GPU where it has one.

    Args:
        engine: a path, a bundled name, or None for "trace-small"; its seal is checked.
        max_batch: the most pictures that go through the engine together.
        buckets: lengths of sides that clients will pad to, as in `EdgeDetector`; the server runs each shape once
            before it says that it is ready.
        output: dtype of the answers where scaling goes into the graph, "float32", "float16" or "uint8" (255 × that).

    Returns:
        FOLDER/NAME.

    Raises:
        EngineError: missing, corrupt or foreign engine.
        ArgumentError: `max_batch` below 1, wrong `buckets`, or the engine's name cannot name a folder.
        OutputError: FOLDER/NAME exists, or cannot be written.
        MissingExtraError: scaling has to go into the graph, and the onnx package is not installed.
    """
    if max_batch < 1:
        raise ArgumentError(f"max_batch={max_batch} must be at least 1.")
    if buckets is not None and output != "float32":
        raise ArgumentError(f"output={output!r} is for photos of any size; leave buckets out.")
    engine = engine or ON_GPU
    detector = EdgeDetector(engine, device="cpu", buckets=buckets)
    model, source = read_engine(engine)
    name = str(detector.info["engine"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ArgumentError(
            f"{source}: its name {name!r} cannot name a model. Export it with --name LETTERS-AND-DIGITS."
        )
    target = Path(folder, name)
    if target.exists():
        raise OutputError(f"{target} exists already. Remove it, or give another folder.")
    if buckets is None and detector.manifest.input != ANY_SIZE:
        from trace_sdk.export.any_size import take_any_size

        model = take_any_size(model, source, output=output)
    target.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in target.parent.glob(f".{name}.*"):  # of a process that was killed; a server would try to load it
        shutil.rmtree(unfinished, ignore_errors=True)
    # The server may watch the folder: the model appears in it whole.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as building:
        made = Path(building, name)
        write_bytes(made / "1/model.onnx", model)
        served = detector if buckets is not None else EdgeDetector(made / "1/model.onnx", device="cpu")
        write_text(made / "config.pbtxt", configuration(served, max_batch))
        made.rename(target)
    return target


def configuration(detector: EdgeDetector, max_batch: int) -> str:
    """The config.pbtxt for an engine, protobuf text of Triton's ModelConfig."""
    info, manifest = detector.info, detector.manifest
    kind = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}[manifest.output]
    parameters = {
        "input": manifest.input,
        "multiple_of": manifest.multiple_of,
        "min_size": manifest.min_size,
        "max_size": manifest.max_size,
        "default_size": manifest.default_size,
        "buckets": ",".join(map(str, detector.buckets)),
        "threshold": manifest.threshold,
        "sha256": info["engine_sha256"],
    }
    lines = [
        f'name: "{info["engine"]}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        'input [{ name: "image", data_type: TYPE_UINT8, dims: [-1, -1, 3] }]',
        f'output [{{ name: "edge_probability", data_type: {kind}, dims: [-1, -1] }}]',
        "instance_group [{ count: 1 }]",
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {QUEUE_DELAY}",
        f"  default_queue_policy {{ max_queue_size: {QUEUE_LENGTH} }}",
        "}",
    ]
    for height, width in detector.bucket_shapes():
        image = f'{{ key: "image", value: {{ data_type: TYPE_UINT8, dims: [{height}, {width}, 3], zero_data: true }} }}'
        lines.append(f'model_warmup [{{ name: "{height}x{width}", batch_size: 1, inputs: {image} }}]')
    lines += [
        f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    ]
    return "\n".join([*lines, ""])
