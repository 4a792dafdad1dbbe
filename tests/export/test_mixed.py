"""16-bit products on a small attention block made by hand, one product of which cannot bear fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines import tensorrt
from trace_sdk.engines.manifest import Manifest, seal
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.errors import DeviceError, EngineError, MissingExtraError, ParityError
from trace_sdk.export import mixed
from trace_sdk.export.any_size import take_any_size
from trace_sdk.export.mixed import KINDS, LIMITS, lower, with_16_bits
from trace_sdk.export.quality import OdsChange, drawn_scenes, ods
from trace_sdk.export.tensorrt import build
from trace_sdk.export.verify import answers

FP16, BF16 = KINDS["fp16-mixed"], KINDS["bf16"]
SHORT = {FP16: np.float16, BF16: helper.tensor_dtype_to_np_dtype(BF16)}


def network(scale: float = 1.0) -> onnx.ModelProto:
    """Conv → attention over the rows (scores `scale` times larger, then divided by it) → Conv → sigmoid."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "half": np.float32(127.5), "one": np.float32(1), "scale": np.float32(1 / scale),
        "w1": rng.normal(size=(4, 3, 3, 3)) * 0.3, "b1": rng.normal(size=4) * 0.1,
        "wq": rng.normal(size=(4, 4)) * scale, "w2": rng.normal(size=(1, 4, 1, 1)), "axis": np.array([1], np.int64),
    }  # fmt: skip
    constants = [
        numpy_helper.from_array(value if np.asarray(value).dtype == np.int64 else np.asarray(value, np.float32), name)
        for name, value in values.items()
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "half"], ["scaled"], "div"),
        helper.make_node("Sub", ["scaled", "one"], ["pixels"], "sub"),
        helper.make_node("Transpose", ["pixels"], ["nchw"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Transpose", ["r1"], ["rows"], "rows", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["rows", "wq"], ["q"], "query"),
        helper.make_node("Transpose", ["rows"], ["k"], "key", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        helper.make_node("Mul", ["scores", "scale"], ["logits"], "logits"),
        helper.make_node("Softmax", ["logits"], ["attention"], "softmax", axis=-1),
        helper.make_node("MatMul", ["attention", "rows"], ["mixed"], "values"),
        helper.make_node("Transpose", ["mixed"], ["back"], "back", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["back", "w2"], ["c2"], "second"),
        helper.make_node("Sigmoid", ["c2"], ["probability"], "sigmoid"),
        helper.make_node("Squeeze", ["probability", "axis"], ["edge_probability"], "squeeze"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    edges = helper.make_tensor_value_info("edge_probability", TensorProto.FLOAT, ["batch", "height", "width"])
    graph = helper.make_graph(nodes, "g", [image], [edges], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    return [np.kron(rng.integers(0, 256, (1, 4, 5, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8) for _ in range(4)]


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Name of each node → type of its first output."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    return {node.name: known[node.output[0]] for node in inferred.graph.node}


@pytest.mark.parametrize("precision", KINDS)
def test_products_have_16_bits_and_softmax_32(precision: str, pictures: list[NDArray[np.uint8]]) -> None:
    model = network()
    result = lower(model, precision, pictures, 0.5)
    onnx.checker.check_model(result.model, full_check=True)
    found = types(result.model)
    low = {"first", "relu", "rows", "query", "key", "scores", "logits", "values", "back", "second", "sigmoid"}
    assert {name for name, kind in found.items() if name in low and kind != KINDS[precision]} == set()
    assert found["softmax"] == found["sub"] == found["squeeze"] == TensorProto.FLOAT
    assert result.layers == 5 and result.too_large == {} == result.kept_in_float and result.measured_on == 4
    weights = {tensor.name: tensor.data_type for tensor in result.model.graph.initializer}
    assert weights["w1/16"] == KINDS[precision] and "w1" not in weights
    assert 0 < result.change.mean <= LIMITS[precision]
    (before,), (after,) = answers(model, pictures[:1]), answers(result.stand_in, pictures[:1])
    assert 0 < np.abs(before - after).mean() <= LIMITS[precision]


@pytest.mark.parametrize("kind", [FP16, BF16])
def test_the_stand_in_rounds_where_the_real_one_holds_16_bits(kind: int) -> None:
    """Of one product and its follower, in numpy."""
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
        helper.make_node("Mul", ["y", "b"], ["z"], "follower"),
        helper.make_node("ReduceSum", ["z", "axis"], ["edge_probability"], "sum", keepdims=0),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 4, 4, 3])
    edges = helper.make_tensor_value_info("edge_probability", TensorProto.FLOAT, [1, 4, 4])
    constants = [
        numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b"),
        numpy_helper.from_array(np.array([3], np.int64), "axis"),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [image], [edges], constants)
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)]))

    def rounded(value: NDArray[np.float32]) -> NDArray[np.float32]:
        return value.astype(SHORT[kind]).astype(np.float32)

    picture = rng.integers(0, 256, (1, 4, 4, 3), np.uint8)
    product = rounded(picture.astype(np.float32) @ rounded(weight))
    expected = rounded(product * rounded(bias)).sum(-1)
    stand_in = with_16_bits(model, kind, ["product"], rounded_only=True)
    np.testing.assert_allclose(answers(stand_in, [picture])[0], expected, rtol=1e-6)
    assert np.abs(answers(model, [picture])[0] - expected).max() > 1e-2
    if kind == FP16:  # which a CPU runs
        real = with_16_bits(model, kind, ["product"], rounded_only=False)
        np.testing.assert_allclose(answers(real, [picture])[0], expected, rtol=5e-3, atol=0.5)


def test_products_too_large_for_fp16_stay_in_fp32(pictures: list[NDArray[np.uint8]]) -> None:
    model = network(scale=1e5)
    result = lower(model, "fp16-mixed", pictures, 0.5)
    assert set(result.too_large) == {"query", "scores"} and min(result.too_large.values()) > mixed.ROOM
    found = types(result.model)
    assert found["scores"] == found["query"] == TensorProto.FLOAT and found["values"] == FP16
    assert result.change.mean <= LIMITS["fp16-mixed"]
    assert all(np.isfinite(answer).all() for answer in answers(result.model, pictures))
    assert lower(model, "bf16", pictures, 0.5).too_large == {}, "bf16 has the range of fp32"


def test_products_that_change_the_edges_stay_in_fp32(
    pictures: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lower(network(), "bf16", pictures, 0.5)
    monkeypatch.setitem(mixed.LIMITS, "bf16", whole.change.mean * 0.8)
    said: list[str] = []
    part = lower(network(), "bf16", pictures, 0.5, note=said.append)
    assert 0 < len(part.kept_in_float) < 5 and part.change.mean <= whole.change.mean * 0.8
    assert {name for name, kind in types(part.model).items() if kind == BF16}.isdisjoint(part.kept_in_float)
    assert "measuring layer 5 of 5 alone" in said
    monkeypatch.setitem(mixed.LIMITS, "bf16", 1e-9)
    with pytest.raises(ParityError, match="No layer can have 16 bits"):
        lower(network(), "bf16", pictures, 0.5)


def bf16_engine(pictures: list[NDArray[np.uint8]], tiny_engine: Path) -> bytes:
    model = lower(network(), "bf16", pictures, 0.5).model
    said = Manifest.from_metadata(read_metadata(tiny_engine.read_bytes(), "tiny"), "tiny")
    for key, value in Manifest(**{**vars(said), "precision": "bf16"}).metadata().items():
        model.metadata_props.add(key=key, value=value)
    return seal(model.SerializeToString())


def test_bf16_without_a_gpu_names_fp16(pictures: list[NDArray[np.uint8]], tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.onnx"
    file.write_bytes(bf16_engine(pictures, tiny_engine))
    for device in ("cpu", "auto"):
        with pytest.raises(DeviceError, match=r"b.onnx: computes in bf16.*--precision fp16"):
            EdgeDetector(file, device=device)
    said = CliRunner().invoke(main, ["info", str(file)])
    assert said.exit_code == 0 and "none here" in said.output and "bf16" in said.output
    assert CliRunner().invoke(main, ["info", str(file), "--device", "cpu"]).exit_code == 1


def test_tensorrt_builds_bf16(pictures: list[NDArray[np.uint8]], tiny_engine: Path) -> None:
    try:
        tensorrt.load_package("tensorrt-rtx")
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert len(build(bf16_engine(pictures, tiny_engine), "b.onnx", "tensorrt-rtx")) > 10_000


def test_a_graph_that_branches_is_refused(tiny_engine: Path, pictures: list[NDArray[np.uint8]]) -> None:
    model = onnx.load_from_string(take_any_size(tiny_engine.read_bytes(), "tiny"))
    with pytest.raises(EngineError, match="branches"):
        lower(model, "fp16-mixed", pictures, 0.5)


def test_ods_of_drawn_scenes_is_that_of_the_edges() -> None:
    scenes = drawn_scenes(3, 96)
    again = drawn_scenes(3, 96)
    for one, other in zip(scenes, again, strict=True):
        np.testing.assert_array_equal(one.rgb, other.rgb)
        assert one.rgb.shape == (96, 96, 3) and 50 < one.boundaries[0].sum() < 2000
    truth = iter([sample.boundaries[0].astype(np.float32)[None] for sample in scenes])
    assert ods(scenes, lambda _: next(truth), 96, lambda side: side) > 0.98
    rng = np.random.default_rng(0)
    assert ods(scenes, lambda _: rng.random((1, 96, 96), np.float32), 96, lambda side: side) < 0.4


@pytest.mark.parametrize(("after", "kept"), [(0.61, True), (0.5981, True), (0.5979, False)])
def test_ods_may_fall_by_the_limit(after: float, kept: bool) -> None:
    assert OdsChange(0.6, after, 3, "photos", True, 0.002).kept is kept
