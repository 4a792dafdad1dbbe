"""A model repository for the Triton Inference Server: the engine file and a config.pbtxt beside it, and on request the
models that decode photos.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_sdk.atomic import unfinished_folder, write_bytes
from trace_sdk.buckets import bucket_shapes, checked_buckets
from trace_sdk.engines import ON_GPU, read_engine
from trace_sdk.engines.manifest import ANSWER_TYPES, ANY_SIZE, Manifest, verify_data, verify_seal
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.plan import MAGIC, Built, unpack
from trace_sdk.errors import ArgumentError, EngineError, OutputError
from trace_sdk.network_input import padded_length
from trace_sdk.serving.photo_models import IMAGE, QUEUE_LENGTH, answer, parameter, photo_models

QUEUE_DELAY = 2000  # µs that a request may wait for others of its shape


@dataclass(frozen=True)
class _Served:
    """What the server gets: `model` as it loads it, and what is known about it; `built` of a TensorRT plan."""

    model: bytes
    manifest: Manifest
    sha256: str
    built: Built | None = None


def write_repository(
    engine: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    max_batch: int = 8,
    buckets: Sequence[int] | None = None,
    output: str | None = None,
    encoded: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write FOLDER/NAME with a config.pbtxt and 1/model.onnx for the onnxruntime backend, or, of a TensorRT `.engine`,
    1/model.plan for the TensorRT backend.

    Clients send `image` uint8 [batch, height, width, 3] RGB and get `edge_probability` [batch, height, width]. Without
    `buckets` they send photos as they are: scaling is in the graph (`trace_sdk.export.any_size`, which needs the onnx
    package unless the engine has it already). With `buckets` they scale and pad to those sides, so that photos of
    different sizes share few shapes. The server batches requests of one shape, and runs on a GPU where it has one.

    With `encoded` there is NAME-photo, too: its `photo` is the bytes of a JPEG, PNG or other file [batch, 1], read as
    `read_image` does, and its answer has the photo's size, also with `buckets`. The server's Python needs trace-sdk.

    Args:
        engine: a path, a bundled name, or None for "trace-small"; its seal is checked. A TensorRT engine needs
            `buckets` and runs only on the GPU and the TensorRT version that it was built for.
        max_batch: the most pictures that go through the engine together.
        buckets: lengths of sides that clients will pad to, as in `EdgeDetector`; the server runs each shape once
            before it says that it is ready.
        output: dtype of the answers where scaling goes into the graph, "float32" (None), "float16" or "uint8", 255 ×
            that; an engine that takes any size has its own.
        encoded: also write NAME-photo, and the models that it is made of.
        note: told if the network will see photos smaller than `EdgeDetector` shows them.

    Returns:
        FOLDER/NAME; with `encoded`, FOLDER/NAME-photo.

    Raises:
        EngineError: missing, corrupt or foreign engine, or a plan of TensorRT-RTX, which Triton cannot run.
        ArgumentError: `max_batch` below 1 or beyond the plan's, wrong `buckets` or none for a plan, an `output` that
            the engine does not have, or the engine's name cannot name a folder.
        OutputError: a model of that name exists in FOLDER, or one cannot be written.
        MissingExtraError: scaling has to go into the graph, and the onnx package is not installed.
    """
    if max_batch < 1:
        raise ArgumentError(f"max_batch={max_batch} must be at least 1.")
    if output not in (None, *ANSWER_TYPES):
        raise ArgumentError(f"output={output!r} is not one of {', '.join(ANSWER_TYPES)}.")
    if buckets is not None and output not in (None, "float32"):
        raise ArgumentError(f"output={output!r} is for photos of any size; leave buckets out.")
    model, source = read_engine(engine or ON_GPU)
    served = _served(model, source)
    manifest, name = served.manifest, served.manifest.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ArgumentError(
            f"{source}: its name {name!r} cannot name a model. Export it with --name LETTERS-AND-DIGITS."
        )
    sides = checked_buckets(buckets, manifest) if buckets is not None else ()
    if sides and sides[-1] < manifest.default_size:
        enough = padded_length(manifest.default_size, manifest.multiple_of, manifest.min_size)
        note(
            f"The network will see photos at {sides[-1]} px, and not at {manifest.default_size} as in detect: edges "
            f"differ. Add a bucket of {enough} for the same."
        )
    if sides and manifest.input == ANY_SIZE:
        raise ArgumentError(f"{name} scales photos inside its graph, so buckets cannot be chosen.")
    if manifest.input == ANY_SIZE and output not in (None, manifest.output):
        raise ArgumentError(
            f"{source}: answers in {manifest.output}, not {output}; use the engine that it was made of."
        )
    output = manifest.output if manifest.input == ANY_SIZE else output or "float32"
    if served.built is not None:
        _check_plan(served.built, source, max_batch, bool(sides))
    beside = verify_data(manifest, source)
    around = photo_models(manifest, max_batch, sides, output) if encoded else {}
    for target in (Path(folder, model_name) for model_name in (name, *around)):
        if target.exists():
            raise OutputError(f"{target} exists already. Remove it, or give another folder.")
    if not sides and manifest.input != ANY_SIZE:
        from trace_sdk.export.any_size import take_any_size

        served = _served(take_any_size(model, source, output=output), source)
    models = {name: {"config.pbtxt": _configuration(served, max_batch, sides).encode()}, **around}
    # The server may watch the folder: models appear in it whole, those that others need first.
    with unfinished_folder(Path(folder, name)) as building:
        version = building / name / "1"
        write_bytes(version / f"model.{'onnx' if served.built is None else 'plan'}", served.model)
        if beside is not None:
            shutil.copyfile(beside / manifest.data["file"], version / manifest.data["file"])
        for model_name, files in models.items():
            for file, content in files.items():
                write_bytes(building / model_name / file, content)
        for model_name in models:
            (building / model_name).rename(Path(folder, model_name))
    return target


def _served(model: bytes, source: str) -> _Served:
    if model.startswith(MAGIC):
        manifest, built, plan, sha256 = unpack(model, source)
        return _Served(plan, manifest, sha256, built)
    return _Served(model, Manifest.from_metadata(read_metadata(model, source), source), verify_seal(model, source))


def _check_plan(built: Built, source: str, max_batch: int, padded: bool) -> None:
    if built.runtime != "tensorrt":
        raise EngineError(
            f"{source}: was built for {built.runtime}; Triton's backend runs plans of TensorRT. Build one on the "
            "server's GPU (trace-sdk export ENGINE.onnx -o X.engine --runtime tensorrt), or give the .onnx engine."
        )
    if not padded:
        raise ArgumentError(f"{source}: TensorRT does not scale photos, so clients have to: give --buckets.")
    if max_batch > built.profile["max"][0]:
        raise ArgumentError(f"max_batch={max_batch}: {source} was built for at most {built.profile['max'][0]}.")


def _configuration(served: _Served, max_batch: int, sides: Sequence[int]) -> str:
    """The config.pbtxt for an engine, protobuf text of Triton's ModelConfig."""
    manifest, built = served.manifest, served.built
    parameters = {
        "input": manifest.input,
        "multiple_of": manifest.multiple_of,
        "min_size": manifest.min_size,
        "max_size": manifest.max_size,
        "default_size": manifest.default_size,
        "buckets": ",".join(map(str, sides)),
        "threshold": manifest.threshold,
        "sha256": served.sha256,
    }
    shapes = bucket_shapes(manifest.default_size, manifest, sides)
    lines = [
        f'name: "{manifest.name}"',
        'backend: "onnxruntime"' if built is None else 'backend: "tensorrt"',
        f"max_batch_size: {max_batch}",
        f"input [{IMAGE}]",
        f"output [{answer(manifest.output)}]",
        "instance_group [{ count: 1 }]" if built is None else "instance_group [{ count: 1, kind: KIND_GPU }]",
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {QUEUE_DELAY}",
        f"  default_queue_policy {{ max_queue_size: {QUEUE_LENGTH} }}",
        "}",
    ]
    if built is not None:
        parameters |= {"gpu": built.gpu, "tensorrt": built.runtime_version}
        graphs = [
            f'graph_spec {{ batch_size: 1, input {{ key: "image", value {{ dim: [{height}, {width}, 3] }} }} }}'
            for height, width in shapes
        ]
        lines.append(f"optimization {{ cuda {{ graphs: true, {', '.join(graphs)} }} }}")
    for height, width in shapes:
        image = f'{{ key: "image", value: {{ data_type: TYPE_UINT8, dims: [{height}, {width}, 3], zero_data: true }} }}'
        lines.append(f'model_warmup [{{ name: "{height}x{width}", batch_size: 1, inputs: {image} }}]')
    lines += [parameter(key, value) for key, value in parameters.items()]
    return "\n".join([*lines, ""])
