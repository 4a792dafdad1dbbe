"""Token labels put where the photo changes: the teacher says between what, the colour gradient says exactly where.

The teacher's edges are bands three tokens wide. A student that learns them as they are answers in bands, and its
thinned edges lie wherever the band's middle happens to be.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from trace_sdk.evaluation.baselines import lab_gradient
from trace_sdk.teacher.pseudo_labels import EDGE, UNCERTAIN

GRADE = 1.5  # steepness of the soft edge, per σ of ABDiv
REACH = 15  # pixels around an edge pixel in which it must be among the steepest
SHARE = 0.7  # of the steepest


def snap(
    rgb: NDArray[np.uint8], labels: NDArray[np.int8], scores: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels and graded edges at pixel resolution.

    Args:
        rgb: uint8 [H, W, 3].
        labels: ternary, int8 [H, W], each token's label over all its pixels.
        scores: (ABDiv − μ)/σ, float32 [H, W].

    Returns:
        labels in which only the steepest pixels of an edge band stay edge, its others uncertain; and graded edges
        float32 [H, W] in [0, 1], see `graded_edges`.
    """
    gradient = lab_gradient(rgb)
    steepest = gradient >= SHARE * maximum_filter(gradient, REACH)
    snapped = np.where((labels == EDGE) & ~steepest, UNCERTAIN, labels).astype(np.int8)
    return snapped, graded_edges(gradient, scores)


def graded_edges(gradient: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """√(soft edge of the score) × colour gradient, both [H, W] at one size: what the student is to answer."""
    soft = 1 / (1 + np.exp(-GRADE * (scores - 1)))
    graded: NDArray[np.float32] = (np.sqrt(soft) * gradient).astype(np.float32)
    return graded
