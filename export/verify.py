"""Parity of an exported graph with PyTorch, and how far one engine's answers are from another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from trace_sdk.errors import ParityError
from trace_sdk.export.graph import EngineGraph

SHAPES = ((1, 8, 8), (1, 16, 9), (3, 12, 20))  # batch, height and width in steps; none is the one exported with
LARGE_STEP = 32  # pixels; where steps are larger, fewer are taken: attention grows with the fourth power of a side
TOLERANCE = 1e-4  # largest difference of a float engine from PyTorch
CHANGE_LIMIT = 0.01  # mean change of the probability that 8 bits may make on photos
PARITY_LIMIT_INT8 = 0.03  # the same at SHAPES, small cuts of photos, where one object fills the picture


Model: TypeAlias = bytes | Path
"""A serialised model, or a file whose weights may lie beside it."""


@dataclass(frozen=True)
class Change:
    """How far the answers of one engine are from another's, over pictures.

    Attributes:
        mean, largest: absolute difference of the edge probability.
        edges: F-measure of one's edge pixels at the threshold against the other's; 1 is the same edges.
    """

    mean: float
    largest: float
    edges: float


def verify(
    model: Model,
    graph: EngineGraph,
    images: Sequence[NDArray[np.uint8]] | None = None,
    *,
    statistic: Callable[[NDArray[np.float32]], float] = np.max,
    limit: float = TOLERANCE,
) -> dict[str, float]:
    """Difference in probability between onnxruntime and torch, by "batch×height×width".

    Args:
        images: uint8 [B, H, W, 3] each; None: noise of `shapes_tried`.
        statistic: of the absolute differences over one of `images`.

    Raises:
        ParityError: a difference above `limit`, NaN, or a shape that the exported graph refuses.
    """
    session = open_session(model)
    rng = np.random.default_rng(0)
    shapes = shapes_tried(graph.student.multiple_of)
    found: dict[str, float] = {}
    for batch in images or [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]:
        label = "×".join(map(str, batch.shape[:3]))
        with torch.inference_mode():
            expected = graph(torch.from_numpy(batch)).numpy()
        try:
            (answer,) = session.run(None, {"image": batch})
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ParityError(f"The exported graph fails at {label}: {error}. Report this with the student.") from error
        same_shape = answer.shape == expected.shape
        difference = float(statistic(np.abs(answer - expected))) if same_shape else float("inf")
        if not difference <= limit:
            raise ParityError(
                f"The exported graph differs from PyTorch by {difference:.2g} at {label}; {limit:g} is allowed. "
                "No file was written."
            )
        found[label] = difference
    return found


def shapes_tried(step: int) -> list[tuple[int, int, int]]:
    """(batch, height, width) at which an engine that takes multiples of `step` pixels is checked."""

    def length(steps: int) -> int:
        return step * (-(-steps * LARGE_STEP // step) if step > LARGE_STEP else steps)

    return [(batch, length(rows), length(columns)) for batch, rows, columns in SHAPES]


def open_session(model: Model | onnx.ModelProto) -> onnxruntime.InferenceSession:
    """On the CPU, without warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def answers(model: Model | onnx.ModelProto, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Edge probability [B, H, W] of each of `images`, uint8 [B, H, W, 3]."""
    session = open_session(model)
    return [session.run(None, {"image": image})[0] for image in images]


def measure_change(
    expected: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]], threshold: float
) -> Change:
    """Compare answers to the same pictures, pixel by pixel, each pixel counting the same."""
    before, after = (np.concatenate([answer.ravel() for answer in side]) for side in (expected, found))
    difference = np.abs(before - after)
    edges_before, edges_after = before >= threshold, after >= threshold
    total = int(edges_before.sum() + edges_after.sum())
    shared = 2 * int((edges_before & edges_after).sum()) / total if total else 1.0
    return Change(float(difference.mean()), float(difference.max()), shared)
