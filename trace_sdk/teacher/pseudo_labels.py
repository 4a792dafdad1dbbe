"""Ternary pseudo-labels (paper 3.4): edge above μ+σ, interior below μ−σ, else uncertain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EDGE, INTERIOR, UNCERTAIN = 1, 0, -1
SMALLEST_INTERIOR = 0.05
SMALLEST_WITH_RING = 5
FLAT = 1e-9  # relative deviation below which a map has no contrast
RANK_OF_MINUS_SIGMA = 0.158655  # share of a normal distribution below μ−σ


def ternary_labels(abdiv: NDArray[np.float32]) -> tuple[NDArray[np.int8], str]:
    """Label each token of one image from its ABDiv.

    ABDiv is skewed to the right, so μ−σ may lie below nearly all tokens. Where it leaves less than 5 % of them
    as interior, the quantile of the same rank (15.9 %) takes its place.

    The outermost ring of tokens is uncertain and stays out of μ, σ and the quantile: its pairs are one-sided and
    span one token in place of two, so its divergence is smaller without being interior (on trace-small's photos
    the ring would hold two thirds of all interior labels). Grids below 5×5 keep their ring.

    Args:
        abdiv: float [H, W], ≥ 0.

    Returns:
        int8 [H, W] of 1 (edge), 0 (interior), −1 (uncertain), and the rule for the interior: "mu-sigma",
        "quantile", or "flat" for a map without any contrast, where every token is uncertain.
    """
    labels = np.full(abdiv.shape, UNCERTAIN, np.int8)
    inside = _inside(abdiv.shape)
    values = abdiv[inside].astype(np.float64)
    mean, deviation = float(values.mean()), float(values.std())
    if deviation <= FLAT * max(1.0, abs(mean)):
        return labels, "flat"
    interior, rule = values < mean - deviation, "mu-sigma"
    if interior.mean() < SMALLEST_INTERIOR:
        interior, rule = values <= np.quantile(values, RANK_OF_MINUS_SIGMA), "quantile"
    labels[inside][interior] = INTERIOR
    labels[inside][values > mean + deviation] = EDGE
    return labels, rule


def standard_scores(abdiv: NDArray[np.float32]) -> NDArray[np.float32]:
    """(ABDiv − μ)/σ of one image, float32 [H, W]; the outermost ring repeats what lies next to it.

    1 is where edges begin and −1 where the interior ends by `ternary_labels`; a flat map is 0 everywhere.
    """
    inside = _inside(abdiv.shape)
    values = abdiv[inside].astype(np.float64)
    mean, deviation = float(values.mean()), float(values.std())
    if deviation <= FLAT * max(1.0, abs(mean)):
        return np.zeros(abdiv.shape, np.float32)
    ring = (abdiv.shape[0] - values.shape[0]) // 2
    scores: NDArray[np.float32] = np.pad((values - mean) / deviation, ring, mode="edge").astype(np.float32)
    return scores


def _inside(shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The grid without its outermost ring."""
    return np.s_[1:-1, 1:-1] if min(shape) >= SMALLEST_WITH_RING else np.s_[:, :]
