"""An engine that takes photos as they are: scaling, padding and cropping inside its graph.

The graph scales as the Python path does, which uses Pillow: the photo by bicubic sums in fixed point, rounded to 8 bits
after each axis, bit for bit; the answer by bilinear sums. It is made of a loop over a filter's taps and not of ONNX's
Resize, whose coefficients are coarser than Pillow's: that moves single levels of single pixels, and the probability of
trace-small there by up to 2e-3.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from trace_sdk.atomic import write_bytes
from trace_sdk.detector import EdgeDetector
from trace_sdk.engines.manifest import ANSWER_TYPES, ANY_SIZE, Manifest, check_one_file, seal, verify_seal
from trace_sdk.errors import ArgumentError, EngineError, MissingExtraError, ParityError
from trace_sdk.network_input import FIXED_POINT

if TYPE_CHECKING:
    import onnx

LIMIT = 1e-3  # largest difference of the probability from the Python path's, rounding to `output` aside
NO_BF16 = "Scaling in the graph is checked by running it on a CPU, which cannot run bf16. Use fp16-mixed."
ROUNDING = {"float32": 0.0, "float16": 2.0**-12, "uint8": 0.5 / 255}  # half a step of each `output`


def take_any_size(engine: bytes, source: str, *, output: str = "float32") -> bytes:
    """The same engine with `image` uint8 [B, H, W, 3] RGB of any size → `edge_probability` [B, H, W] at that size.

    The network inside sees photos scaled to the engine's `default_size`, always in one piece.

    Args:
        engine: bytes of an engine file. source: its name for messages.
        output: "float32" or "float16", probabilities; "uint8", 255 × probability, rounded.

    Returns:
        Bytes of an engine file, sealed anew.

    Raises:
        EngineError: not whole, it takes any size already, or it computes in bf16.
        ArgumentError: an unknown `output`.
        ParityError: its answers differ from the Python path's by more than LIMIT.
        MissingExtraError: the onnx package is not installed.
    """
    if output not in ANSWER_TYPES:
        raise ArgumentError(f"output={output!r} is not one of {', '.join(ANSWER_TYPES)}.")
    need_onnx("Putting scaling into the graph")
    import onnx

    verify_seal(engine, source)
    model = onnx.load_from_string(engine)
    manifest = Manifest.from_metadata({entry.key: entry.value for entry in model.metadata_props}, source)
    if manifest.input == ANY_SIZE:
        raise EngineError(f"{source}: takes photos of any size already. Use it, or the engine that it was made of.")
    if manifest.precision == "bf16":
        raise EngineError(f"{source}: {NO_BF16}")
    check_one_file(manifest, source, "scaling in the graph")
    whole = _wrapped(model, manifest, output)
    for key, value in dataclasses.replace(manifest, input=ANY_SIZE, output=output).metadata().items():
        whole.metadata_props.add(key=key, value=value)
    sealed = seal(whole.SerializeToString())
    _verify(engine, sealed, manifest.default_size, ROUNDING[output])
    return sealed


def need_onnx(what: str) -> None:
    """Raises MissingExtraError if graphs cannot be edited here; `what` needs it."""
    if find_spec("onnx") is None:
        raise MissingExtraError(f"{what} needs the onnx package. Run: pip install onnx")


class _Graph:
    """Nodes under construction: `graph.Add(a, b)` adds one and gives the name of what it makes.

    Arguments are such names, or numpy values that become constants.
    """

    def __init__(self, prefix: str, outer: _Graph | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = [] if outer is None else outer.constants
        self._prefix = prefix

    def __getattr__(self, operator: str) -> Callable[..., str]:
        from onnx import helper

        def add(*inputs: str | np.generic | np.ndarray[Any, Any], **attributes: Any) -> str:
            made = f"{self._prefix}/{operator}_{len(self.nodes)}"
            names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
            self.nodes.append(helper.make_node(operator, names, [made], made, **attributes))
            return made

        return add

    def _constant(self, value: np.generic | np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        name = f"{self._prefix}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _wrapped(engine: onnx.ModelProto, manifest: Manifest, output: str) -> onnx.ModelProto:
    """The engine's graph between the nodes that scale the photo and those that scale the answer."""
    from onnx import TensorProto, compose, helper

    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}[output]
    network = compose.add_prefix_graph(engine.graph, "network/")
    graph = _Graph("photo")
    shape = graph.Shape("image")
    sides = [graph.Gather(shape, np.int64(axis)) for axis in (1, 2)]
    longest = graph.Max(*sides)
    scaled, padded = [], []
    for side in sides:
        # As `trace_sdk.network_input.fit`: to the nearest whole pixel, halves to the even one.
        exact = graph.Div(_double(graph, graph.Mul(side, np.int64(manifest.default_size))), _double(graph, longest))
        scaled.append(graph.Max(_whole(graph, graph.Round(exact)), np.int64(1)))
        steps = graph.Div(graph.Add(scaled[-1], np.int64(manifest.multiple_of - 1)), np.int64(manifest.multiple_of))
        padded.append(graph.Max(graph.Mul(steps, np.int64(manifest.multiple_of)), np.int64(manifest.min_size)))
    pixels = graph.Transpose("image", perm=[0, 2, 1, 3])
    for axis in (1, 0):  # the width first, as there
        taps, weights = _filter(graph, _bicubic, 2.0, sides[axis], scaled[axis], padded[axis])
        fixed = graph.Mul(weights, np.float64(1 << FIXED_POINT))
        rounded = graph.Cast(graph.Add(fixed, graph.Mul(graph.Sign(fixed), np.float64(0.5))), to=TensorProto.INT32)
        total = _summed(graph, pixels, taps, rounded, 2, TensorProto.INT32)
        levels = graph.Div(graph.Add(total, np.int32(1 << (FIXED_POINT - 1))), np.int32(1 << FIXED_POINT))
        levels = graph.Cast(graph.Clip(levels, np.int32(0), np.int32(255)), to=TensorProto.UINT8)
        pixels = graph.Transpose(levels, perm=[0, 2, 1, 3]) if axis else levels
    graph.nodes.append(helper.make_node("Identity", [pixels], ["network/image"]))
    graph.nodes += network.node
    after = _Graph("answer", graph)
    probability = after.Transpose("network/edge_probability", perm=[0, 2, 1])
    for axis in (1, 0):
        taps, weights = _filter(after, _triangle, 1.0, scaled[axis], sides[axis], sides[axis])
        share = after.Cast(weights, to=TensorProto.FLOAT)
        probability = _summed(after, probability, taps, share, 1, TensorProto.FLOAT)
        probability = after.Transpose(probability, perm=[0, 2, 1]) if axis else probability
    probability = after.Clip(probability, np.float32(0), np.float32(1))
    if output == "uint8":
        probability = after.Round(after.Mul(probability, np.float32(255)))
    after.nodes.append(helper.make_node("Cast", [probability], ["edge_probability"], to=kind))
    whole = helper.make_graph(
        [*graph.nodes, *after.nodes],
        engine.graph.name,
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("edge_probability", kind, ["batch", "height", "width"])],
        [*network.initializer, *graph.constants],
        # onnxruntime needs the rank: its layout pass fails on an image pyramid without.
        value_info=[helper.make_tensor_value_info("network/image", TensorProto.UINT8, ["batch", None, None, 3])],
    )
    return helper.make_model(
        whole, opset_imports=engine.opset_import, ir_version=engine.ir_version, functions=engine.functions
    )


def _filter(
    graph: _Graph, kernel: Callable[[_Graph, str], str], reach: float, source: str, scaled: str, out: str
) -> tuple[str, str]:
    """Of one axis, scaled from `source` to `scaled` samples and lengthened to `out` by repeating the last one:

    which samples each result is a sum of, int64 [taps, out], and their shares, double [taps, out].
    """
    half, one = np.float64(0.5), np.int64(1)
    scale = graph.Div(_double(graph, source), _double(graph, scaled))
    stretch = graph.Max(scale, np.float64(1))
    support = graph.Mul(stretch, np.float64(reach))
    count = graph.Add(graph.Mul(_whole(graph, graph.Ceil(support)), np.int64(2)), one)
    place = graph.Min(graph.Range(np.int64(0), out, one), graph.Sub(scaled, one))
    centre = graph.Mul(graph.Add(_double(graph, place), half), scale)
    first = graph.Max(_whole(graph, graph.Add(graph.Sub(centre, support), half)), np.int64(0))
    end = graph.Min(_whole(graph, graph.Add(graph.Add(centre, support), half)), source)
    number = graph.Unsqueeze(graph.Range(np.int64(0), count, one), np.array([1]))
    tap = graph.Add(first, number)
    offset = graph.Add(graph.Sub(_double(graph, tap), centre), half)
    value = kernel(graph, graph.Abs(graph.Mul(offset, graph.Reciprocal(stretch))))
    share = graph.Where(graph.Less(tap, end), value, np.float64(0))
    total = graph.ReduceSum(share, np.array([0]))
    return graph.Min(tap, graph.Sub(source, one)), graph.Div(share, total)


def _bicubic(graph: _Graph, x: str) -> str:
    """Keys' kernel with a = −1/2 at distances x ≥ 0."""

    def polynomial(*factors: float) -> str:
        value = graph.Mul(x, np.float64(factors[0]))
        for factor in factors[1:-1]:
            value = graph.Mul(graph.Add(value, np.float64(factor)), x)
        return graph.Add(value, np.float64(factors[-1]))

    near, far = polynomial(1.5, -2.5, 0.0, 1.0), polynomial(-0.5, 2.5, -4.0, 2.0)
    beyond = graph.Where(graph.Less(x, np.float64(2)), far, np.float64(0))
    return graph.Where(graph.Less(x, np.float64(1)), near, beyond)


def _triangle(graph: _Graph, x: str) -> str:
    return graph.Max(graph.Sub(np.float64(1), x), np.float64(0))


def _summed(graph: _Graph, values: str, taps: str, weights: str, behind: int, kind: int) -> str:
    """Σ over taps of `values` there × its weight, along axis 1, which has `behind` axes behind it; `kind` of ONNX.

    Axis 1, so that a gather copies whole rows.
    """
    from onnx import TensorProto, helper

    name = f"{taps}/sum"
    body = _Graph(f"{name}/body", graph)
    tap, weight = (body.Gather(given, f"{name}/number", axis=0) for given in (taps, weights))
    along = body.Unsqueeze(weight, np.arange(1, behind + 1))
    part = body.Mul(body.Cast(body.Gather(values, tap, axis=1), to=kind), along)
    body.nodes.append(helper.make_node("Add", [f"{name}/sum", part], [f"{name}/next"]))
    more = body.Identity(f"{name}/going")
    anything = [None] * (behind + 2)
    loop = helper.make_graph(
        body.nodes,
        name,
        [
            helper.make_tensor_value_info(f"{name}/number", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{name}/going", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"{name}/sum", kind, anything),
        ],
        [
            helper.make_tensor_value_info(more, TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"{name}/next", kind, anything),
        ],
    )
    before, after = graph.Shape(values, end=1), graph.Shape(values, start=2)
    nothing = graph.ConstantOfShape(graph.Concat(before, graph.Shape(taps, start=1), after, axis=0))
    count = graph.Gather(graph.Shape(taps), np.int64(0))
    return graph.Loop(count, np.bool_(True), graph.Cast(nothing, to=kind), body=loop)


def _double(graph: _Graph, value: str) -> str:
    return graph.Cast(value, to=11)


def _whole(graph: _Graph, value: str) -> str:
    """Towards zero."""
    return graph.Cast(value, to=7)


def _verify(padded: bytes, any_size: bytes, size: int, rounding: float) -> None:
    """Raises ParityError if the two answer a photo differently: larger than the network sees, smaller, a strip."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        detectors = []
        for name, engine in (("padded", padded), ("any-size", any_size)):
            write_bytes(Path(folder, name), engine)
            detectors.append(EdgeDetector(Path(folder, name), device="cpu"))
        for height, width in ((size * 5 // 4, size + 1), (size // 3, size // 2), (3, size * 2)):
            rough = PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
            photo = np.asarray(rough.resize((width, height)))
            expected, found = (detector.run(photo).probability for detector in detectors)
            difference = float(np.abs(expected - found).max())
            if not difference <= LIMIT + rounding:
                raise ParityError(
                    f"With scaling in the graph a photo of {width}x{height} changes by {difference:.2g}; "
                    f"{LIMIT:g} is allowed. No file was written."
                )
