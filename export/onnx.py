"""A student as one ONNX file: weights and metadata inside, parity checked, sealed by sha256."""

from __future__ import annotations

import logging
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch.export import Dim
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.verify import verify

from trace_sdk import __version__
from trace_sdk.atomic import write_bytes
from trace_sdk.engines.manifest import Manifest, seal
from trace_sdk.errors import ArgumentError
from trace_sdk.machine import commit
from trace_sdk.student.model import Student

OPSET = 18
PRECISIONS = ("fp16", "fp32")


def export_onnx(
    student: Student,
    out: Path,
    *,
    name: str,
    precision: str = "fp16",
    default_size: int = 512,
    max_size: int = 768,
    licence: str = "Apache-2.0",
    quality: dict[str, Any] | None = None,
) -> Manifest:
    """Write `student` as an engine file.

    Args:
        precision: of the stored weights; arithmetic is fp32 in both.
        default_size: longest side in pixels that the network sees unless the caller says otherwise.
        max_size: longest side in one piece; larger images go by tiles.
        quality: figures to keep in the file.

    Raises:
        ArgumentError: an unknown precision.
        ParityError: the graph's answers differ from PyTorch's; nothing is written.
        OutputError: the file cannot be written.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    graph = EngineGraph(student, half_weights=precision == "fp16")
    model = _to_onnx(graph)
    if precision == "fp16":
        store_weights_in_fp16(model)
    parity = verify(model.SerializeToString(), graph)
    manifest = Manifest(
        format_version=1,
        name=name,
        trace_sdk_version=__version__,
        backbone=student.backbone.family,
        backbone_sha256=_weights_sha256(student),
        decoder="stem-unet",
        multiple_of=student.backbone.multiple_of,
        min_size=student.backbone.min_size,
        max_size=max_size,
        default_size=default_size,
        threshold=student.threshold,
        precision=precision,
        opset=OPSET,
        producers={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        quality=quality or {},
        parity=parity,
        licence=licence,
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        commit=commit() or "",
    )
    for key, value in manifest.metadata().items():
        model.metadata_props.add(key=key, value=value)
    write_bytes(out, seal(model.SerializeToString()))
    return manifest


def _to_onnx(graph: EngineGraph) -> onnx.ModelProto:
    # A batch of 2: with 1 the exporter bakes the batch in without a word.
    example = torch.zeros(2, 96, 128, 3, dtype=torch.uint8)
    shapes = {"image": {0: Dim("batch"), 1: 8 * Dim("rows", min=8), 2: 8 * Dim("columns", min=8)}}
    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["edge_probability"],
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del part.metadata_props[:]  # stack traces of the machine that exported, as large as a small engine
        part.doc_string = ""
    return model


def _weights_sha256(student: Student) -> str:
    import hashlib

    digest = hashlib.sha256()
    for _, value in sorted(student.backbone.transformer.state_dict().items()):
        digest.update(value.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()
