"""A student as one ONNX file: weights and metadata inside, parity checked, sealed by sha256."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch.export import Dim

from trace_sdk import __version__
from trace_sdk.atomic import write_bytes
from trace_sdk.engines.manifest import Manifest, seal, verify_seal
from trace_sdk.errors import ArgumentError, EngineError
from trace_sdk.export.any_size import take_any_size
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.int8 import check, quantise
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.report import ExportReport
from trace_sdk.export.verify import PARITY_LIMIT_INT8, answers, measure_change, open_session, shapes_tried, verify
from trace_sdk.images import read_image
from trace_sdk.machine import commit
from trace_sdk.network_input import fit, padded_length
from trace_sdk.student.folder import AnyStudent

OPSET = 18
PRECISIONS = ("fp16", "fp32", "int8")
LARGEST = 2**31 - 2**24  # bytes of float32 weights; a protobuf holds 2 GiB, and the graph needs some of it
CALIBRATION_PHOTOS = 64


def export_onnx(
    student: AnyStudent,
    out: Path,
    *,
    name: str,
    precision: str = "fp16",
    default_size: int | None = None,
    max_size: int = 768,
    photos: Sequence[Path] = (),
    calibration: str = "entropy",
    any_size: bool = False,
    output: str = "float32",
    licence: str = "Apache-2.0",
    quality: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write `student` as an engine file, and tell what was measured on the way.

    Args:
        precision: "fp32" or "fp16" weights, arithmetic in fp32; or "int8" weights and activations in each layer
            whose answers allow it, see `trace_sdk.export.int8`.
        default_size: longest side in pixels that the network sees unless the caller says otherwise; None: the
            student's own.
        max_size: longest side in one piece; larger images go by tiles.
        photos: for int8, pictures like those the engine will see; of more than 64, 64 evenly spread are taken.
        calibration: for int8, "entropy", "percentile" or "minmax".
        any_size: put scaling, padding and cropping into the graph, see `trace_sdk.export.any_size`.
        output: dtype of the answers, for which `any_size` is needed unless it is "float32".
        quality: figures to keep in the file.
        note: told what is being done, for progress.

    Raises:
        ArgumentError: an unknown precision or calibration, too few `photos`, or `photos` without int8.
        EngineError: the student is too large for one ONNX file.
        ParityError: the graph's answers differ from PyTorch's, or 8 bits change them too much; nothing is written.
        ImageError: a photo cannot be read.
        OutputError: the file cannot be written.
    """
    start = time.perf_counter()
    default_size = default_size or student.default_size
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if (precision == "int8") != bool(photos):
        raise ArgumentError("int8 needs photos to calibrate on, and only int8 takes them (--calibrate PHOTOS/).")
    if precision == "int8":
        check(photos, calibration)
    if output != "float32" and not any_size:
        raise ArgumentError(f"output={output!r} needs scaling in the graph (--any-size).")
    weights = 4 * sum(value.numel() for value in student.parameters())
    if weights > LARGEST:
        raise EngineError(
            f"The weights take {weights / 1e9:.1f} GB as float32; one ONNX file holds 2 GB, and an engine is one file "
            "so that its sha256 covers all of it. Distil into a smaller backbone."
        )
    padded = partial(padded_length, multiple_of=student.multiple_of, min_size=student.min_size)
    fitted = [
        fit(read_image(photo).rgb, default_size, padded)[0][None] for photo in _spread(photos, CALIBRATION_PHOTOS)
    ]

    note("tracing the graph")
    graph = EngineGraph(student, half_weights=precision != "fp32")
    model = _to_onnx(graph)
    note("checking it against PyTorch")
    float_model = model.SerializeToString()
    parity = verify(float_model, graph)
    change, change_on, int8 = None, "", None
    if precision == "int8":
        quantised = quantise(model, fitted, student.threshold, calibration=calibration, note=note)
        model, change = quantised.model, quantised.change
        change_on = f"{quantised.measured_on} photos not calibrated on"
        int8 = {key: value for key, value in vars(quantised).items() if key not in ("model", "change")}
    if precision != "fp32":
        store_weights_in_fp16(model)
    stored = model.SerializeToString()
    if precision == "int8":
        note("checking 8 bits against PyTorch")
        parity = verify(
            stored, graph, _cuts(fitted, graph.student.multiple_of), statistic=np.mean, limit=PARITY_LIMIT_INT8
        )
    elif precision == "fp16":
        verify(stored, graph)
        pictures, change_on = _blobs(padded(min(default_size, 256))), "random blobs"
        with torch.inference_mode():
            unrounded = EngineGraph(student, half_weights=False)
            expected = [unrounded(torch.from_numpy(picture)).numpy() for picture in pictures]
        change = measure_change(expected, answers(stored, pictures), student.threshold)

    manifest = Manifest(
        name=name,
        trace_sdk_version=__version__,
        backbone=student.family,
        backbone_sha256=student.weights_sha256(),
        decoder=student.decoder_name,
        multiple_of=student.multiple_of,
        min_size=student.min_size,
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
    sealed = seal(model.SerializeToString())
    if any_size:
        note("putting scaling into the graph")
        sealed = take_any_size(sealed, name, output=output)
        model = onnx.load_from_string(sealed)
    note("timing an answer")
    milliseconds, float_milliseconds = _milliseconds([sealed, float_model], padded(default_size))
    write_bytes(out, sealed)
    return ExportReport(
        engine=name,
        sha256=verify_seal(sealed, out),
        precision=precision,
        parity=parity,
        change=change,
        change_on=change_on,
        file_bytes=len(sealed),
        float_bytes=len(float_model),
        nodes=len(model.graph.node),
        milliseconds=milliseconds,
        float_milliseconds=float_milliseconds,
        int8=int8,
        seconds=time.perf_counter() - start,
    )


def _spread(photos: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, evenly spread."""
    count = min(len(photos), most)
    return [photos[number * len(photos) // count] for number in range(count)]


def _cuts(photos: Sequence[NDArray[np.uint8]], step: int) -> list[NDArray[np.uint8]]:
    """Batches of `shapes_tried` from photos [1, H, W, 3], scaled until they cover the shape, and cut."""
    cuts = []
    for batch, height, width in shapes_tried(step):
        pictures = [PIL.Image.fromarray(photos[number % len(photos)][0]) for number in range(batch)]
        cuts.append(np.stack([np.asarray(PIL.ImageOps.fit(picture, (width, height))) for picture in pictures]))
    return cuts


def _blobs(side: int) -> list[NDArray[np.uint8]]:
    """Four pictures uint8 [1, side, side, 3] of coloured blobs, the same each time."""
    rough = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    return [np.array(PIL.Image.fromarray(one).resize((side, side)))[None] for one in rough]


def _milliseconds(models: Sequence[bytes], side: int) -> list[float]:
    """Median answer of each to a square, of three after one that doesn't count, in turn."""
    sessions = [open_session(model) for model in models]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(4):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {"image": np.zeros((1, side, side, 3), np.uint8)})
            taken.append((time.perf_counter() - start) * 1e3)
    return [median(taken[1:]) for taken in times]


def _to_onnx(graph: EngineGraph) -> onnx.ModelProto:
    # A batch of 2: with 1 the exporter bakes the batch in without a word.
    step = graph.student.multiple_of
    least = graph.student.min_size // step
    example = torch.zeros(2, 12 * step, 16 * step, 3, dtype=torch.uint8)
    shapes = {"image": {0: Dim("batch"), 1: step * Dim("rows", min=least), 2: step * Dim("columns", min=least)}}
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
