"""8-bit layers on a small network made by hand, one layer of which cannot bear 8 bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trace_sdk.errors import ArgumentError, ParityError
from trace_sdk.export.int8 import CALIBRATIONS, quantise
from trace_sdk.export.precision import store_weights_in_fp16
from trace_sdk.export.verify import CHANGE_LIMIT, Change, answers, measure_change


def engine_of(nodes: list[onnx.NodeProto], values: dict[str, Any]) -> onnx.ModelProto:
    """An engine of the nodes that lead from `scaled`, pixels over 127.5, to `sum`; `values` are their constants."""
    values = {"scale": np.float32(1 / 127.5), "axis": np.array([1], np.int64), **values}
    begin = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["scaled"], "mul"),
    ]
    end = [
        helper.make_node("ReduceMean", ["sum", "axis"], ["logits"], "mean", keepdims=0),
        helper.make_node("Sigmoid", ["logits"], ["edge_probability"], "sigmoid2"),
    ]
    constants = [
        numpy_helper.from_array(value if np.asarray(value).dtype == np.int64 else np.asarray(value, np.float32), name)
        for name, value in values.items()
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    edges = helper.make_tensor_value_info("edge_probability", TensorProto.FLOAT, ["batch", "height", "width"])
    graph = helper.make_graph([*begin, *nodes, *end], "g", [image], [edges], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def network(fragile: float, channels: int = 20) -> onnx.ModelProto:
    """Conv 3×3 → SiLU → Conv 1×1 → + a Conv whose input's last channel is `fragile` times larger → mean → sigmoid.

    That channel has weight 0, so it says nothing but takes the whole range of its tensor.
    """
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "one": np.float32(1),
        "huge": np.array([1, 1, fragile], np.float32).reshape(1, 3, 1, 1),
        "w1": rng.normal(size=(channels, 3, 3, 3)) * np.geomspace(0.01, 1, channels).reshape(-1, 1, 1, 1) / 3,
        "b1": rng.normal(size=channels) * 0.1,
        "w2": rng.normal(1, 1, (1, channels, 1, 1)) * np.linspace(0.5, 1.5, 16).reshape(-1, 1, 1, 1),
        "w3": np.array([2.0, -2.0, 0.0]).reshape(1, 3, 1, 1) * np.linspace(1.5, 0.5, 16).reshape(-1, 1, 1, 1),
    }
    nodes = [
        helper.make_node("Sub", ["scaled", "one"], ["pixels"], "sub"),
        helper.make_node("Conv", ["pixels", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c1"], ["s1"], "sigmoid1"),
        helper.make_node("Mul", ["c1", "s1"], ["a1"], "silu"),
        helper.make_node("Conv", ["a1", "w2"], ["c2"], "second"),
        helper.make_node("Mul", ["pixels", "huge"], ["spread"], "spread"),
        helper.make_node("Conv", ["spread", "w3"], ["c3"], "fragile"),
        helper.make_node("Add", ["c2", "c3"], ["sum"], "add"),
    ]
    return engine_of(nodes, values)


def residual_network() -> onnx.ModelProto:
    """A narrow filter of 3 channels, then three wide convolutions with a Relu and a way around between them."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "filter": rng.normal(size=(3, 3, 1, 1)),
        "w1": rng.normal(size=(16, 3, 3, 3)) / 5,
        "w2": rng.normal(size=(16, 1, 5, 5)) / 5,
        "w3": rng.normal(size=(16, 16, 1, 1)) / 4,
    }
    nodes = [
        helper.make_node("Conv", ["scaled", "filter"], ["filtered"], "narrow"),
        helper.make_node("Conv", ["filtered", "w1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "depthwise", pads=[2, 2, 2, 2], group=16),
        helper.make_node("Conv", ["c2", "w3"], ["c3"], "last"),
        helper.make_node("Add", ["r1", "c3"], ["sum"], "add"),
    ]
    return engine_of(nodes, values)


@pytest.fixture(scope="module")
def photos() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    return [np.kron(rng.integers(0, 256, (1, 5, 6, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8) for _ in range(11)]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_all_layers_are_8_bit_where_they_can_be(calibration: str, photos: list[NDArray[np.uint8]]) -> None:
    model = network(fragile=1)
    said: list[str] = []
    result = quantise(model, photos, 0.5, calibration=calibration, note=said.append)
    assert result.kept_in_float == {} and result.layers == 3 and result.calibration == calibration
    assert (result.calibrated_on, result.measured_on) == (8, 3), "no photo is in both"
    assert 0 < result.change.mean <= CHANGE_LIMIT and result.change.edges > 0.97
    new = photos[0][:, ::-1, ::-1].copy()  # not calibrated on
    (before,), (after,) = answers(model, [new]), answers(result.model, [new])
    assert np.abs(before - after).mean() <= CHANGE_LIMIT
    weights = [t for t in result.model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4]
    assert len(weights) == 3
    assert any(text.startswith("calibrating on photo 8 of 8") for text in said)


def test_between_layers_values_stay_in_8_bits(photos: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    """Relu, the way around and its sum, too: onnxruntime runs wide convolutions in 8 bits, the narrow one in float."""
    result = quantise(residual_network(), photos, 0.5)
    assert result.layers == 3 and result.kept_in_float == {}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it says that such a file is for this machine
    onnxruntime.InferenceSession(result.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (found["QLinearConv"], found["QLinearAdd"], found["Conv"], found["Relu"]) == (3, 1, 1, 0)


def test_weights_have_a_scale_for_each_channel(photos: list[NDArray[np.uint8]]) -> None:
    """Its channels differ a hundredfold: with one scale the smallest would have a single level."""
    result = quantise(network(fragile=1), photos, 0.5)
    found = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    scales = next(value for name, value in found.items() if name.startswith("w1") and "scale" in name)
    assert scales.shape == (20,) and scales.max() / scales.min() > 20
    levels = np.abs(next(value for name, value in found.items() if name.startswith("w1") and value.ndim == 4))
    assert levels.reshape(20, -1).max(1).min() >= 126


def test_the_layer_that_loses_accuracy_stays_in_float(photos: list[NDArray[np.uint8]]) -> None:
    model = network(fragile=3000)
    result = quantise(model, photos, 0.5, calibration="minmax")
    assert list(result.kept_in_float) == ["fragile"] and result.kept_in_float["fragile"] > 0.05
    assert result.change.mean <= CHANGE_LIMIT
    kept = next(node for node in result.model.graph.node if node.name == "fragile")
    assert kept.input[1] == "w3", "its weight is not behind a DequantizeLinear"


def test_fp16_storing_leaves_scales_alone(photos: list[NDArray[np.uint8]]) -> None:
    result = quantise(network(fragile=3000, channels=300), photos[:4], 0.5, calibration="minmax")
    before = answers(result.model, photos[:1])[0]
    assert store_weights_in_fp16(result.model) == 0, "300 scales stay as they are; the bias is int32"
    assert np.abs(answers(result.model, photos[:1])[0] - before).max() < 1e-3


def test_nothing_in_8_bits_is_no_8_bit_engine(photos: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_sdk.export.int8.CHANGE_LIMIT", 1e-7)
    with pytest.raises(ParityError, match=r"No layer can have 8 bits.*fp16"):
        quantise(network(fragile=1), photos, 0.5)


@pytest.mark.parametrize(("count", "calibration", "match"), [(1, "entropy", "at least 2"), (4, "kl", "entropy, perc")])
def test_bad_requests(count: int, calibration: str, match: str, photos: list[NDArray[np.uint8]]) -> None:
    with pytest.raises(ArgumentError, match=match):
        quantise(network(fragile=1), photos[:count], 0.5, calibration=calibration)


def test_change() -> None:
    before = [np.array([[0.1, 0.9], [0.6, 0.2]], np.float32), np.array([[0.9]], np.float32)]
    after = [np.array([[0.1, 0.8], [0.4, 0.2]], np.float32), np.array([[0.9]], np.float32)]
    assert measure_change(before, before, 0.5) == Change(0, 0, 1)
    change = measure_change(before, after, 0.5)
    assert change.mean == pytest.approx(0.3 / 5) and change.largest == pytest.approx(0.2)
    assert change.edges == pytest.approx(2 * 2 / (3 + 2))
    assert measure_change(before, after, 0.95).edges == 1, "no edges on either side"
