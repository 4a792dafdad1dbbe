"""The models around an engine that let clients of a Triton Inference Server send photos as files.

NAME-photo is an ensemble: NAME-decode in the Python backend, the engine, and with buckets NAME-restore.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import PIL.Image

from trace_sdk.engines.manifest import Manifest
from trace_sdk.pictures import png_bytes

QUEUE_LENGTH = 256  # requests that may wait; more are refused at once

_PHOTO = '{ name: "photo", data_type: TYPE_STRING, dims: [1] }'
IMAGE = '{ name: "image", data_type: TYPE_UINT8, dims: [-1, -1, 3] }'
_PLACEMENT = '{ name: "placement", data_type: TYPE_INT32, dims: [4] }'
_PADDED = '{ name: "padded", data_type: TYPE_FP32, dims: [-1, -1] }'


def photo_models(manifest: Manifest, max_batch: int, sides: Sequence[int], output: str) -> dict[str, dict[str, bytes]]:
    """Files of each model, by their path in its folder; the ensemble, which needs the others, comes last.

    Args:
        sides: the buckets, ascending, or none where the engine scales photos itself.
        output: dtype of the answers.
    """
    edges = answer(output)
    decode, restore, name = (f"{manifest.name}-{step}" for step in ("decode", "restore", "photo"))
    size = min(manifest.default_size, sides[-1]) if sides else manifest.default_size
    known = {"size": str(size), "buckets": ",".join(map(str, sides))}
    models = {decode: _step("Decode", decode, max_batch, [_PHOTO], [IMAGE, _PLACEMENT] if sides else [IMAGE], known)}
    models[decode]["warmup/photo"] = _warmup_photo()
    steps = [(decode, {"photo": "photo"}, {"image": "image"})]
    if not sides:
        steps.append((manifest.name, {"image": "image"}, {"edge_probability": "edge_probability"}))
    else:
        models[restore] = _step("Restore", restore, max_batch, [_PADDED, _PLACEMENT], [edges], {})
        steps[0][2]["placement"] = "placement"
        steps += [
            (manifest.name, {"image": "image"}, {"edge_probability": "padded"}),
            (restore, {"padded": "padded", "placement": "placement"}, {"edge_probability": "edge_probability"}),
        ]
    lines = [
        f'name: "{name}"',
        'platform: "ensemble"',
        f"max_batch_size: {max_batch}",
        f"input [{_PHOTO}]",
        f"output [{edges}]",
        "ensemble_scheduling {",
        *(f'  step [{{ model_name: "{model}", model_version: -1, {_maps(*ends)} }}]' for model, *ends in steps),
        "}",
        parameter("threshold", manifest.threshold),
        "",
    ]
    # The server wants a version's folder of an ensemble too, and folders are made for files.
    models[name] = {"config.pbtxt": "\n".join(lines).encode(), "1/README": b"The steps are in ../config.pbtxt.\n"}
    return models


def answer(output: str) -> str:
    """The output of an engine that answers in that dtype."""
    kind = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}[output]
    return f'{{ name: "edge_probability", data_type: {kind}, dims: [-1, -1] }}'


def parameter(key: str, value: object) -> str:
    """A line of config.pbtxt."""
    return f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}'


def _maps(inputs: dict[str, str], outputs: dict[str, str]) -> str:
    kinds = [("input_map", pair) for pair in inputs.items()] + [("output_map", pair) for pair in outputs.items()]
    return ", ".join(f'{kind} {{ key: "{key}", value: "{value}" }}' for kind, (key, value) in kinds)


def _step(
    step: str, name: str, max_batch: int, inputs: Sequence[str], outputs: Sequence[str], parameters: dict[str, str]
) -> dict[str, bytes]:
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {max_batch}",
        f"input [{', '.join(inputs)}]",
        f"output [{', '.join(outputs)}]",
        "instance_group [{ count: 1, kind: KIND_CPU }]",
        f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {QUEUE_LENGTH} }} }}",
        *(parameter(key, value) for key, value in parameters.items()),
        "",
    ]
    if step == "Decode":
        # A server whose Python cannot run the steps shall not say that it is ready.
        photo = '{ key: "photo", value: { data_type: TYPE_STRING, dims: [1], input_data_file: "photo" } }'
        lines.insert(-1, f'model_warmup [{{ name: "photo", batch_size: 1, inputs: {photo} }}]')
    source = f"from trace_sdk.serving.photo_steps import {step} as TritonPythonModel  # noqa: F401\n"
    return {"config.pbtxt": "\n".join(lines).encode(), "1/model.py": source.encode()}


def _warmup_photo() -> bytes:
    """A grey PNG as the server keeps bytes: behind their length."""
    png = png_bytes(PIL.Image.new("L", (64, 64), 128))
    return struct.pack("<I", len(png)) + png
