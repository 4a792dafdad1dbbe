"""Weights of a graph: inside its file, or in one beside it where a single ONNX file cannot hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model, set_external_data

ONE_FILE = 2**31 - 2**24  # bytes of weights; a protobuf holds 2 GiB, and the graph needs some of it
SMALLEST = 1024  # bytes; smaller constants stay in the graph, where onnxruntime can use them for shapes
PAGE = 4096  # bytes; where a weight starts on one, it can be mapped instead of read


def stored_bytes(model: onnx.ModelProto) -> int:
    """Of all weights, wherever they lie."""
    return sum(_bytes(tensor) for tensor in model.graph.initializer)


def move_in(model: onnx.ModelProto, folder: Path) -> None:
    """Bring weights that lie in `folder` into the graph."""
    load_external_data_for_model(model, str(folder))


def move_out(model: onnx.ModelProto, folder: Path, file: Path) -> dict[str, Any]:
    """Write weights, those inside and those that lie in `folder`, to a new `file`; the graph then names it.

    One weight after another, so that they are never all in memory.

    Returns:
        The manifest's `data`: name of the file, bytes, sha256.
    """
    digest, place = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor, str(folder))
            if values.nbytes < SMALLEST:
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                continue
            content = values.tobytes()
            padded = content + bytes(-len(content) % PAGE)
            stream.write(padded)
            digest.update(padded)
            tensor.raw_data = b""  # says to the next line that raw bytes are what there is
            set_external_data(tensor, file.name, place, len(content))
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
                tensor.ClearField(field)
            place += len(padded)
    return {"file": file.name, "bytes": place, "sha256": digest.hexdigest()}


def _bytes(tensor: TensorProto) -> int:
    size = 1
    for side in tensor.dims:
        size *= side
    return size * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
