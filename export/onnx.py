"""A student as one ONNX file: weights and metadata inside, parity checked, sealed by sha256."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim

from trace_sdk import __version__
from trace_sdk.atomic import unfinished_folder, write_whole
from trace_sdk.engines.manifest import Manifest, seal, verify_seal
from trace_sdk.errors import ArgumentError, EngineError, OutputError, ParityError
from trace_sdk.export.any_size import NO_BF16, take_any_size
from trace_sdk.export.graph import EngineGraph
from trace_sdk.export.int8 import check, quantise
from trace_sdk.export.mixed import KINDS, LIMITS, lower
from trace_sdk.export.pictures import blobs, spread
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.quality import DRAWN_SIDE, OdsChange, ods, pictures_with_truth
from trace_sdk.export.quality import LIMITS as ODS_LIMITS
from trace_sdk.export.report import ExportReport
from trace_sdk.export.verify import (
    PARITY_LIMIT_INT8,
    Model,
    answers,
    measure_change,
    open_session,
    shapes_tried,
    verify,
)
from trace_sdk.export.weights import ONE_FILE, move_in, move_out, stored_bytes
from trace_sdk.images import read_image
from trace_sdk.machine import commit
from trace_sdk.network_input import fit, padded_length
from trace_sdk.student.folder import AnyStudent

OPSET = 18
MOST_IMAGES = 63  # in a batch; from 64 on a UNet orders its memory otherwise, which a graph has no part in
PRECISIONS = ("fp32", "fp16", *KINDS, "int8")
OPSET_BF16 = 22  # the first whose convolutions have bf16
TRACED = "traced.onnx"  # its weights beside it
TIMED_SIDE = 512  # longest side of the square that is timed; onnxruntime holds all attention of a VAE at once
CALIBRATION_PHOTOS = 64


def export_onnx(
    student: AnyStudent,
    out: Path,
    *,
    name: str,
    precision: str = "fp16",
    default_size: int | None = None,
    max_size: int | None = None,
    photos: Sequence[Path] = (),
    calibration: str = "entropy",
    annotated: Path | None = None,
    any_size: bool = False,
    output: str = "float32",
    licence: str = "Apache-2.0",
    quality: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write `student` as an engine file, and tell what was measured on the way.

    Where one ONNX file cannot hold the weights, they lie beside it in OUT.data, whose sha256 the engine keeps.

    Args:
        precision: "fp32" or "fp16" weights, arithmetic in fp32; "fp16-mixed" or "bf16", 16-bit products for GPUs, see
            `trace_sdk.export.mixed`; "int8" weights and activations, see `trace_sdk.export.int8`. The last three in
            each layer whose answers allow it.
        default_size: longest side in pixels that the network sees unless the caller says otherwise; None: the
            student's own.
        max_size: longest side in one piece; larger images go by tiles. None: the student's own.
        photos: for int8, and if wanted for 16-bit products, pictures like those the engine will see; of more than 64,
            64 evenly spread are taken.
        calibration: for int8, "entropy", "percentile" or "minmax".
        annotated: folder of photos whose boundaries people marked, to tell by how much ODS changes; None: drawn scenes.
        any_size: put scaling, padding and cropping into the graph, see `trace_sdk.export.any_size`.
        output: dtype of the answers, for which `any_size` is needed unless it is "float32".
        quality: figures to keep in the file.
        note: told what is being done, for progress.

    Raises:
        ArgumentError: an unknown precision or calibration, a `default_size` that the student does not take, too few
            `photos`, or `photos` that precision does not take.
        DatasetError: `annotated` holds no data set.
        EngineError: the student's family has no graph, or it is too large for what was asked.
        ParityError: the graph's answers differ from PyTorch's, or fewer bits change them too much, or cost more of
            ODS on `annotated` than is allowed; nothing is written.
        ImageError: a photo cannot be read.
        OutputError: the file cannot be written.
    """
    start = time.perf_counter()
    default_size = student.default_size if default_size is None else default_size
    max_size = max_size or student.max_size
    if not student.min_size <= default_size <= max_size:
        raise ArgumentError(
            f"default_size={default_size} must be from {student.min_size} to {max_size} px, what this student takes in "
            "one piece (--default-size)."
        )
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if (precision == "int8" and not photos) or (precision in ("fp32", "fp16") and photos):
        raise ArgumentError(
            "int8 needs photos to calibrate on (--calibrate PHOTOS/); of the others only those with 16-bit arithmetic "
            f"({', '.join(KINDS)}) take them."
        )
    if precision == "int8":
        check(photos, calibration)
    if annotated is not None and precision == "fp32":
        raise ArgumentError("fp32 is what the others are compared with: leave --evaluate out, or give a --precision.")
    if any_size and precision == "bf16":
        raise ArgumentError(NO_BF16)
    if output != "float32" and not any_size:
        raise ArgumentError(f"output={output!r} needs scaling in the graph (--any-size).")
    if student.no_graph:
        raise EngineError(
            f"Students of {student.family} cannot be exported: {student.no_graph}. Run the folder itself, in torch "
            "(runtime='torch')."
        )
    weights = 4 * sum(value.numel() for value in student.parameters())
    large = weights > ONE_FILE
    if large and (precision not in ("fp32", "fp16") or any_size):
        raise EngineError(
            f"The weights take {weights / 1e9:.1f} GB as float32, which lie beside the graph; scaling in the graph and "
            f"{precision} need one file, which holds 2 GB. Export at fp16 without --any-size."
        )
    padded = partial(padded_length, multiple_of=student.multiple_of, min_size=student.min_size)
    side = padded(min(default_size, 256))

    @torch.inference_mode()
    def unrounded(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the student itself answers to [1, H, W, 3]."""
        answer: NDArray[np.float32] = exact(torch.from_numpy(picture)).numpy()
        return answer

    fitted = [fit(read_image(photo).rgb, default_size, padded)[0][None] for photo in spread(photos, CALIBRATION_PHOTOS)]

    if out.is_dir():
        raise OutputError(f"{out} is a folder. Give the engine's file in it (-o), for example {out / 'mine.onnx'}.")
    with unfinished_folder(out) as work:
        note("tracing the graph")
        graph = EngineGraph(student, half_weights=precision in ("fp16", "int8"))
        exact = EngineGraph(student, half_weights=False)
        opset = OPSET_BF16 if precision == "bf16" else OPSET
        model = _to_onnx(graph, opset, work if large else None)
        note("checking it against PyTorch")
        float_model: Model = work / TRACED if large else model.SerializeToString()
        float_bytes = stored_bytes(model) if isinstance(float_model, Path) else len(float_model)
        parity = verify(float_model, graph)
        change, change_on, layers = None, "", None
        on_cpu: onnx.ModelProto | None = None  # what stands in for an engine that no CPU runs
        if precision == "int8":
            quantised = quantise(model, fitted, student.threshold, calibration=calibration, note=note)
            model, change = quantised.model, quantised.change
            change_on = f"{quantised.measured_on} photos not calibrated on"
            layers = {key: value for key, value in vars(quantised).items() if key not in ("model", "change")}
        elif precision in KINDS:
            pictures, change_on = (fitted, f"{len(fitted)} photos") if fitted else (blobs(side), "random blobs")
            lowered = lower(model, precision, pictures, student.threshold, note=note)
            model, on_cpu, change = lowered.model, lowered.stand_in, lowered.change
            layers = {key: value for key, value in vars(lowered).items() if key not in ("model", "stand_in", "change")}
            onnx.checker.check_model(model, full_check=True)
        if precision in ("fp16", "int8"):
            store_weights_in_fp16(model, work)
        data: dict[str, Any] = {}
        if stored_bytes(model) > ONE_FILE:
            data = move_out(model, work, work / f"{out.name}.data")
        elif large:
            move_in(model, work)
        stored = model.SerializeToString()
        held: Model = stored
        if data:
            held = work / "stored.onnx"
            held.write_bytes(stored)
        answering: Model = held if on_cpu is None else on_cpu.SerializeToString()
        if precision == "int8" or precision in KINDS:
            note("checking fewer bits against PyTorch")
            cuts = _cuts(fitted or blobs(side), graph.student.multiple_of)
            limit = PARITY_LIMIT_INT8 if precision == "int8" else 2 * LIMITS[precision]
            parity = verify(answering, graph, cuts, statistic=np.mean, limit=limit)
            if precision == "fp16-mixed":  # a CPU runs it in its own way: a wrong cast would show
                verify(stored, graph, cuts, statistic=np.mean, limit=limit)
        elif precision == "fp16":
            verify(held, graph)
            pictures, change_on = blobs(side), "random blobs"
            expected = [unrounded(picture) for picture in pictures]
            change = measure_change(expected, answers(held, pictures), student.threshold)
        edges = None
        if precision != "fp32":
            note("comparing edges with known boundaries")
            edges = _ods_change(unrounded, answering, annotated, precision, default_size, padded)
            if edges.annotated and not edges.kept:
                raise ParityError(
                    f"ODS falls from {edges.before:.3f} to {edges.after:.3f} on {edges.sample}; {edges.limit:g} is "
                    "allowed. No file was written. Calibrate on other photos, or export at a higher precision."
                )

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
            opset=opset,
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
            data=data,
        )
        for key, value in manifest.metadata().items():
            model.metadata_props.add(key=key, value=value)
        sealed = seal(model.SerializeToString())
        if any_size:
            note("putting scaling into the graph")
            sealed = take_any_size(sealed, name, output=output)
            model = onnx.load_from_string(sealed)
        note("timing an answer")
        timed: list[Model] = [float_model] if precision == "bf16" else [float_model, held if data else sealed]
        float_milliseconds, *milliseconds = _milliseconds(timed, padded(min(default_size, TIMED_SIDE)))
        with write_whole(out) as file:
            file.write(sealed)
            if data:
                # Whole before it appears, just before what names it; a load in between says that the two don't fit.
                with (work / data["file"]).open("r+b") as written:
                    os.fsync(written.fileno())
                (work / data["file"]).replace(out.with_name(data["file"]))
        return ExportReport(
            engine=name,
            sha256=verify_seal(sealed, out),
            precision=precision,
            parity=parity,
            change=change,
            change_on=change_on,
            file_bytes=len(sealed) + data.get("bytes", 0),
            float_bytes=float_bytes,
            nodes=len(model.graph.node),
            milliseconds=milliseconds[0] if milliseconds else None,
            float_milliseconds=float_milliseconds,
            layers=layers,
            ods=edges,
            seconds=time.perf_counter() - start,
        )


def _ods_change(
    unrounded: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    model: Model,
    annotated: Path | None,
    precision: str,
    default_size: int,
    padded: Callable[[int], int],
) -> OdsChange:
    samples, what = pictures_with_truth(annotated)
    size = default_size if annotated else min(default_size, DRAWN_SIDE)
    session = open_session(model)
    before = ods(samples, unrounded, size, padded)
    after = ods(samples, lambda pixels: session.run(None, {"image": pixels})[0], size, padded)
    return OdsChange(before, after, len(samples), what, annotated is not None, ODS_LIMITS[precision])


def _cuts(photos: Sequence[NDArray[np.uint8]], step: int) -> list[NDArray[np.uint8]]:
    """Batches of `shapes_tried` from photos [1, H, W, 3], scaled until they cover the shape, and cut."""
    cuts = []
    for batch, height, width in shapes_tried(step):
        pictures = [PIL.Image.fromarray(photos[number % len(photos)][0]) for number in range(batch)]
        cuts.append(np.stack([np.asarray(PIL.ImageOps.fit(picture, (width, height))) for picture in pictures]))
    return cuts


def _milliseconds(models: Sequence[Model], side: int) -> list[float]:
    """Median answer of each to a square, of three after one that doesn't count, in turn."""
    sessions = [open_session(model) for model in models]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(4):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {"image": np.zeros((1, side, side, 3), np.uint8)})
            taken.append((time.perf_counter() - start) * 1e3)
    return [median(taken[1:]) for taken in times]


def _to_onnx(graph: EngineGraph, opset: int = OPSET, work: Path | None = None) -> onnx.ModelProto:
    """The graph with its weights inside; or, given a folder, as TRACED in it, with the weights beside that."""
    # A batch of 2: with 1 the exporter bakes the batch in without a word.
    step = graph.student.multiple_of
    least = graph.student.min_size // step
    example = torch.zeros(2, 12 * step, 16 * step, 3, dtype=torch.uint8)
    shapes = {
        "image": {
            0: Dim("batch", max=MOST_IMAGES),
            1: step * Dim("rows", min=least),
            2: step * Dim("columns", min=least),
        }
    }
    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    backbone = getattr(graph.student, "backbone", None)
    with warnings.catch_warnings(), backbone.as_graph() if backbone else nullcontext():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["edge_probability"],
            dynamic_shapes=shapes,
            external_data=work is not None,
            verbose=False,
        )
    assert program is not None
    if work is not None:
        program.save(work / TRACED, external_data=True)
    model = program.model_proto if work is None else onnx.load(work / TRACED, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del part.metadata_props[:]  # stack traces of the machine that exported, as large as a small engine
        part.doc_string = ""
    without_cosines(model)
    return model


def without_cosines(model: onnx.ModelProto) -> None:
    """Make sines of cosines of float64, which turn queries and keys by where they lie: cos x = sin(x + π/2).

    onnxruntime has them from 1.29 on; on a Mac with Intel, or with macOS 13, 1.23 is the last there is.
    """
    graph, quarter = model.graph, "quarter_turn"
    double = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.DOUBLE}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Cos" and node.input[0] in double:
            turned = f"{node.output[0]}_turned"
            nodes.append(helper.make_node("Add", [node.input[0], quarter], [turned], f"{node.name}_turned"))
            node = helper.make_node("Sin", [turned], node.output, node.name)
        nodes.append(node)
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.append(numpy_helper.from_array(np.array(np.pi / 2), quarter))
