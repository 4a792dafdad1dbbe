"""Parity of an exported graph with PyTorch, at sizes and batches it was not exported with."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from trace_sdk.export.graph import EngineGraph

from trace_sdk.errors import ParityError

SHAPES = ((1, 64, 64), (1, 128, 72), (3, 96, 160))
TOLERANCE = 1e-4


def verify(model: bytes, graph: EngineGraph) -> dict[str, float]:
    """Largest absolute difference in probability between onnxruntime and torch, by "batch×height×width".

    Raises:
        ParityError: a difference above 1e-4, NaN, or a shape that the exported graph refuses.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    worst: dict[str, float] = {}
    for batch, height, width in SHAPES:
        label = f"{batch}×{height}×{width}"
        images = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
        with torch.inference_mode():
            expected = graph(torch.from_numpy(images)).numpy()
        try:
            (answer,) = session.run(None, {"image": images})
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ParityError(f"The exported graph fails at {label}: {error}. Report this with the student.") from error
        difference = float(np.abs(answer - expected).max()) if answer.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise ParityError(
                f"The exported graph differs from PyTorch by {difference:.2g} at {label}; {TOLERANCE:g} is allowed. "
                "No file was written."
            )
        worst[label] = difference
    return worst
