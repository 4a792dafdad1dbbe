"""8-bit engines: ranges from the user's photos, layers that lose accuracy kept in float, both by measurement.

Weights are int8 with one scale an output channel; activations uint8 with one scale a tensor, from a calibration by
entropy (KL, as TensorRT does it), percentile or minimum and maximum. Layers are the convolutions and the products with
a weight; what only hands values from one convolution to the next stays in 8 bits with them, since every change of
precision between two costs more time than 8 bits save. Attention itself (activation times activation), norms and
everything else stay in float.
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType
from onnxruntime.quantization.calibrate import EntropyCalibrater, MinMaxCalibrater, PercentileCalibrater
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from trace_sdk.errors import ArgumentError
from trace_sdk.export.selection import Note, fewest_in_float
from trace_sdk.export.verify import CHANGE_LIMIT, Change, answers, measure_change

PERCENTILE = 99.99
CALIBRATIONS: dict[str, Callable[..., Any]] = {
    "entropy": EntropyCalibrater,
    "percentile": lambda *places: PercentileCalibrater(*places, percentile=PERCENTILE),
    "minmax": MinMaxCalibrater,
}
_OPERATORS = ("Conv", "MatMul", "Gemm")
_CARRIERS = ("Relu", "Add", "Resize")  # 8 bits in, 8 bits out, between convolutions
LEAST_CHANNELS = 16  # of a layer's answer: with fewer 8 bits were no faster on the Xeon tried, depthwise far slower

Photo = NDArray[np.uint8]  # [1, H, W, 3], as the network takes it


@dataclass(frozen=True)
class Quantised:
    """An 8-bit model and how it came about.

    Attributes:
        model: QDQ, opset as before.
        calibration: name of the method.
        calibrated_on, measured_on: numbers of photos; no photo is in both.
        layers: number of layers that could be 8-bit.
        kept_in_float: name of each layer that stayed in float → mean change of the probability when it alone is 8-bit.
        change: from the float engine, on the photos measured on.
    """

    model: onnx.ModelProto
    calibration: str
    calibrated_on: int
    measured_on: int
    layers: int
    kept_in_float: dict[str, float]
    change: Change


def quantise(
    model: onnx.ModelProto,
    photos: Sequence[Photo],
    threshold: float,
    *,
    calibration: str = "entropy",
    note: Note = lambda text: None,
) -> Quantised:
    """Make a float engine 8-bit, as much of it as its answers allow.

    Every fifth photo is kept for measuring, at least one; the others calibrate. If 8 bits everywhere change the edge
    probability by more than CHANGE_LIMIT on average, each layer is measured alone, and as few of the worst as needed
    stay in float.

    Args:
        model: float32, with the ends of an engine.
        threshold: of the engine's edges, for the F-measure in `Change`.
        note: told what is being done, for progress.

    Raises:
        ArgumentError: fewer than two photos, or an unknown calibration.
        ParityError: no layer can be 8-bit within the limit.
    """
    check(photos, calibration)
    measured = photos[::5]
    calibrating = [photo for number, photo in enumerate(photos) if number % 5]
    model = onnx.shape_inference.infer_shapes(model)
    layers = _layers(model)
    ranges = _ranges(model, layers, calibrating, calibration, note)
    expected = answers(model, measured)

    def tried(names: Sequence[str], on: int | None) -> tuple[onnx.ModelProto, Change]:
        candidate = _with_8_bits(model, ranges, names)
        return candidate, measure_change(expected[:on], answers(candidate, measured[:on]), threshold)

    best, change, kept = fewest_in_float(layers, tried, CHANGE_LIMIT, "8 bits", note)
    return Quantised(best, calibration, len(calibrating), len(measured), len(layers), kept, change)


def check(photos: Sequence[object], calibration: str) -> None:
    """Raises ArgumentError as `quantise` would, before minutes of other work."""
    if calibration not in CALIBRATIONS:
        raise ArgumentError(f"calibration={calibration!r} is not one of {', '.join(CALIBRATIONS)}.")
    if len(photos) < 2:
        raise ArgumentError("8-bit export needs at least 2 photos: some to calibrate on, others to measure. Give 20.")


def _layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that multiply with a weight and answer with channels enough."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in _OPERATORS and node.input[1] in shapes]
    return [node.name for node in products if _channels(node, shapes[node.input[1]]) >= LEAST_CHANNELS]


def _channels(node: onnx.NodeProto, weight: Sequence[int]) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weight[0] if node.op_type == "Conv" or transposed else weight[-1]


def _with_carriers(model: onnx.ModelProto, layers: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes of these layers, and those that read only what convolutions among them, or one another, answer."""
    chosen = set(layers)
    in_8_bits: set[str] = set()
    nodes = []
    for node in model.graph.node:
        carries = node.op_type in _CARRIERS and in_8_bits.issuperset(_activations(node))
        if carries or node.name in chosen:
            nodes.append(node)
        if carries or (node.op_type == "Conv" and node.name in chosen):
            in_8_bits.update(node.output)
    return nodes


def _activations(node: onnx.NodeProto) -> list[str]:
    """What a layer or carrier reads, apart from weights and sizes."""
    return list(node.input) if node.op_type == "Add" else [node.input[0]]


class _OnePhoto(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, photo: Photo) -> None:
        self._inputs: Iterator[dict[str, Photo]] = iter([{"image": photo}])

    def get_next(self) -> dict[str, Photo] | None:
        return next(self._inputs, None)


def _ranges(
    model: onnx.ModelProto, layers: Sequence[str], photos: Sequence[Photo], calibration: str, note: Note
) -> Any:
    """onnxruntime's TensorsData: the range of what layers and carriers read and answer over the photos."""
    known = {value.name: value for value in model.graph.value_info}
    nodes = _with_carriers(model, layers)
    wanted = {name for node in nodes for name in (*_activations(node), node.output[0]) if name in known}
    with tempfile.TemporaryDirectory() as folder, _quietly():
        places = (Path(folder, "float.onnx"), list(_OPERATORS), f"{folder}/watched.onnx")
        onnx.save(model, places[0])
        calibrator = CALIBRATIONS[calibration](*places)
        # Left to itself it would watch attention maps as well, which hold N × N values each.
        calibrator.select_tensors_to_calibrate = lambda _: (wanted, known)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        for number, photo in enumerate(photos, start=1):
            note(f"calibrating on photo {number} of {len(photos)}")
            calibrator.collect_data(_OnePhoto(photo))
        return calibrator.compute_data()


def _with_8_bits(model: onnx.ModelProto, ranges: Any, layers: Sequence[str]) -> onnx.ModelProto:
    options = {
        "WeightSymmetric": True,
        # A product's float answer goes on as it is: what follows it needs the resolution.
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
    }
    nodes, operators = [node.name for node in _with_carriers(model, layers)], [*_OPERATORS, *_CARRIERS]
    weights, activations = QuantType.QInt8, QuantType.QUInt8
    with _quietly():
        quantizer = QDQQuantizer(
            copy.deepcopy(model), True, False, weights, activations, ranges, nodes, [], operators, options
        )
        quantizer.quantize_model()
    quantised = quantizer.model.model
    assert isinstance(quantised, onnx.ModelProto)
    del quantised.graph.value_info[:]
    return quantised


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the prints and warnings of onnxruntime.quantization."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
