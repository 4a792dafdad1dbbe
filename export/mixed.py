"""Arithmetic in 16 bits, for GPUs: products and what only passes them on; sums, norms and softmax stay in float32.

Convolutions and matrix products take and give 16 bits (they add up in float32 on every GPU that is meant here), as
do moves and simple elementwise nodes all of whose float inputs are 16-bit or constant, so that few casts are left. A
product whose answers come near the largest number of fp16 stays in float32, and so do the fewest products without
which the edges would change too much; both are measured on pictures.

A CPU cannot run bf16, and runs fp16 in its own way. What is measured is therefore a stand-in: the same graph in float32
with every value rounded to 16 bits where the real one holds 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trace_sdk.errors import EngineError
from trace_sdk.export.selection import fewest_in_float
from trace_sdk.export.verify import Change, answers, measure_change, open_session

KINDS = {"fp16-mixed": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LIMITS = {"fp16-mixed": 0.002, "bf16": 0.01}  # mean change of the probability that is allowed
ROOM = 65504 / 4  # largest value, of any picture measured on, that may be held in fp16
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Gather", "Identity")
_FOLLOW = frozenset((*_MOVES, "Add", "Mul", "Neg", "Relu", "Sigmoid", "Tanh"))
_ANY_TYPE = ("Shape", "Size")  # they look at no value

Pictures = Sequence[NDArray[np.uint8]]  # [1, H, W, 3] each


@dataclass(frozen=True)
class Lowered:
    """A model with 16-bit products and how it came about.

    Attributes:
        model: the real one. stand_in: the same in float32 with rounding, for CPUs.
        layers: number of products.
        too_large: name of each product that stayed in float32 → the largest value it gave; fp16 only.
        kept_in_float: the same of those that changed the edges too much → mean change when it alone is 16-bit.
        change: of the stand-in from the float model, on `measured_on` pictures.
    """

    model: onnx.ModelProto
    stand_in: onnx.ModelProto
    layers: int
    too_large: dict[str, float]
    kept_in_float: dict[str, float]
    change: Change
    measured_on: int


def lower(
    model: onnx.ModelProto,
    precision: str,
    pictures: Pictures,
    threshold: float,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Lowered:
    """Give a float32 engine 16-bit products, as many as its answers allow.

    Args:
        precision: one of KINDS.
        pictures: to measure on, at least one.
        threshold: of the engine's edges, for the F-measure in `Change`.
        note: told what is being done, for progress.

    Raises:
        EngineError: the graph branches.
        ParityError: no product can have 16 bits within the limit.
    """
    kind, limit = KINDS[precision], LIMITS[precision]
    model = onnx.shape_inference.infer_shapes(model)
    if any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in model.graph.node for a in n.attribute
    ):
        raise EngineError(
            "A graph that branches cannot have 16-bit arithmetic. Leave --any-size out, or export at fp16."
        )
    products = [node.name for node in model.graph.node if node.op_type in _PRODUCTS]
    too_large: dict[str, float] = {}
    if kind == TensorProto.FLOAT16:
        note("looking for values too large for fp16")
        too_large = _too_large(model, products, pictures)
    free = [name for name in products if name not in too_large]
    expected = answers(model, pictures)

    def tried(names: Sequence[str], on: int | None) -> tuple[list[str], Change]:
        stand_in = with_16_bits(model, kind, names, rounded_only=True)
        return list(names), measure_change(expected[:on], answers(stand_in, pictures[:on]), threshold)

    chosen, change, kept = fewest_in_float(free, tried, limit, "16 bits", note)
    return Lowered(
        with_16_bits(model, kind, chosen, rounded_only=False),
        with_16_bits(model, kind, chosen, rounded_only=True),
        len(products),
        too_large,
        kept,
        change,
        len(pictures),
    )


def with_16_bits(
    model: onnx.ModelProto, kind: int, products: Collection[str], *, rounded_only: bool
) -> onnx.ModelProto:
    """The model with those products, and what only passes them on, in `kind`.

    With `rounded_only` all of it stays float32 and only the values are rounded: what a CPU can run.
    """
    return _Rewriting(model, kind, frozenset(products), rounded_only).model


def _too_large(model: onnx.ModelProto, products: Sequence[str], pictures: Pictures) -> dict[str, float]:
    """Of the products that give, or whose followers give, values above ROOM: the largest."""
    watched = copy.deepcopy(model)
    followers = _followers(model, frozenset(products))
    made = [name for node in model.graph.node if node.name in followers for name in node.output]
    del watched.graph.output[:]
    for name in made:
        watched.graph.node.append(helper.make_node("Abs", [name], [f"{name}/absolute"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"{name}/absolute"], [f"{name}/largest"], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(f"{name}/largest", TensorProto.FLOAT, []))
    session = open_session(watched)
    largest = np.max(
        [[float(value) for value in session.run(None, {"image": picture})] for picture in pictures], axis=0
    )
    found: dict[str, float] = {}
    for name, value in zip(made, largest, strict=True):
        for product in followers[_maker(model, name)] if value > ROOM else ():
            found[product] = max(found.get(product, 0.0), float(value))
    return found


def _maker(model: onnx.ModelProto, tensor: str) -> str:
    return next(str(node.name) for node in model.graph.node if tensor in node.output)


def _followers(model: onnx.ModelProto, products: frozenset[str]) -> dict[str, frozenset[str]]:
    """Name of each node that can be 16-bit if `products` are → the products whose values it passes on."""
    constants = {tensor.name for tensor in model.graph.initializer}
    floats = _floats(model)
    ends = {value.name for value in model.graph.output}
    found: dict[str, frozenset[str]] = {}
    comes_from: dict[str, frozenset[str]] = {}
    for node in model.graph.node:
        sources = [comes_from.get(name) for name in node.input if name in floats and name not in constants]
        if ends & set(node.output):
            continue
        if node.name in products:
            found[node.name] = frozenset([node.name])
        elif node.op_type in _FOLLOW and sources and all(source is not None for source in sources):
            found[node.name] = frozenset().union(*(source for source in sources if source is not None))
        else:
            continue
        comes_from.update(dict.fromkeys(node.output, found[node.name]))
    return found


def _floats(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors."""
    graph = model.graph
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    typed = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return typed | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


class _Rewriting:
    """Casts where 32 bits meet 16; weights of 16-bit nodes stored in 16 bits."""

    def __init__(self, model: onnx.ModelProto, kind: int, products: frozenset[str], rounded_only: bool) -> None:
        self._kind, self._rounded_only = kind, rounded_only
        self._floats, self._low = _floats(model), set[str]()
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._made: dict[str, onnx.TensorProto] = {}
        self._cast: dict[tuple[str, int], str] = {}
        followers = _followers(model, products)
        for original in model.graph.node:
            node = copy.deepcopy(original)
            if node.name in followers:
                self._lower(node)
            else:
                self._keep(node)
        self.model = copy.deepcopy(model)
        graph = self.model.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        tensors = [tensor for tensor in (*self._weights.values(), *self._made.values()) if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(tensors)

    def _keep(self, node: onnx.NodeProto) -> None:
        """A node in 32 bits."""
        if node.op_type not in _ANY_TYPE and not self._rounded_only:
            for place, name in enumerate(node.input):
                if name in self._low:
                    node.input[place] = self._as(name, TensorProto.FLOAT)
        self._nodes.append(node)

    def _lower(self, node: onnx.NodeProto) -> None:
        """A node in 16 bits."""
        for place, name in enumerate(node.input):
            if name in self._weights and name in self._floats:
                node.input[place] = self._weight(name)
            elif name in self._floats and name not in self._low:
                node.input[place] = self._rounded(name) if self._rounded_only else self._as(name, self._kind)
        self._nodes.append(node)
        for place, name in enumerate(node.output):
            if name not in self._floats:
                continue
            self._low.add(name)
            if self._rounded_only and node.op_type not in _MOVES:
                node.output[place] = f"{name}/exact"
                self._round_to(f"{name}/exact", name)

    def _as(self, name: str, kind: int) -> str:
        if (name, kind) not in self._cast:
            made = self._cast[name, kind] = f"{name}/{helper.tensor_dtype_to_string(kind).rpartition('.')[2].lower()}"
            self._nodes.append(helper.make_node("Cast", [name], [made], made, to=kind))
        return self._cast[name, kind]

    def _rounded(self, name: str) -> str:
        if (name, self._kind) not in self._cast:
            self._cast[name, self._kind] = f"{name}/rounded"
            self._round_to(name, f"{name}/rounded")
        return self._cast[name, self._kind]

    def _round_to(self, name: str, made: str) -> None:
        self._nodes.append(helper.make_node("Cast", [name], [f"{made}/short"], f"{made}/short", to=self._kind))
        self._nodes.append(helper.make_node("Cast", [f"{made}/short"], [made], f"{made}/long", to=TensorProto.FLOAT))

    def _weight(self, name: str) -> str:
        made = f"{name}/16"
        if made not in self._made:
            values = numpy_helper.to_array(self._weights[name])
            short = values.astype(helper.tensor_dtype_to_np_dtype(self._kind))
            self._made[made] = numpy_helper.from_array(short.astype(np.float32) if self._rounded_only else short, made)
        return made
