"""Precision of stored weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SMALLEST = 256  # elements; below that a Cast costs more than it saves


def store_weights_in_fp16(model: onnx.ModelProto, folder: str | Path = "") -> int:
    """Store large fp32 initializers as fp16 with a Cast to fp32 behind each; arithmetic stays fp32.

    onnxruntime folds the Casts when it loads the engine, so speed is unchanged and the file half as large.
    Scales of 8-bit layers stay as they are. Weights may lie in a file in `folder`; those changed are inside then.
    Returns the number of initializers changed.
    """
    casts, changed = [], 0
    eight_bit = ("QuantizeLinear", "DequantizeLinear")
    scales = {name for node in model.graph.node if node.op_type in eight_bit for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < SMALLEST or tensor.name in scales:
            continue
        name = tensor.name
        half = numpy_helper.from_array(numpy_helper.to_array(tensor, str(folder)).astype(np.float16), f"{name}.fp16")
        tensor.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT))
        changed += 1
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return changed
