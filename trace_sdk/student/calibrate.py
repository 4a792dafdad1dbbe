"""The threshold of a student's edges, and how sure it is; no annotation takes part."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trace_sdk.evaluation.edges import THRESHOLDS, added_up, count_edges, harmonic_mean
from trace_sdk.student.folder import AnyStudent
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.teacher.pseudo_labels import EDGE
from trace_sdk.thinning import thin_lines, thin_ridges

AS_GOOD = 0.99  # of the best F-measure on scenes


@torch.inference_mode()
def calibrate_threshold(student: AnyStudent, images: LabelledImages, size: int, crops: int = 48) -> tuple[float, float]:
    """The probability k/100 with the best F-measure against the snapped edge labels, and that F-measure.

    Over crops of side `size`, the same ones each time.

    Uncertain pixels count as no edge here: left out, they would let the threshold fall until bands fill them.
    """
    device = next(student.parameters()).device
    probabilities, truths = [], []
    for step in range(crops // 4):
        batch, labels, _ = images.batch(step + (1 << 30), 4, size)  # steps that training never reaches
        probabilities.append(student.logits(batch.to(device)).cpu().sigmoid().flatten())
        truths.append((labels == EDGE).flatten())
    return best_threshold(torch.cat(probabilities), torch.cat(truths))


def best_threshold(probability: Tensor, truth: Tensor) -> tuple[float, float]:
    """k/100 that gives the best F-measure of `probability ≥ k/100` against bool `truth`, both [n]; and it."""
    best, found = -1.0, 0.5
    for k in range(1, THRESHOLDS + 1):
        predicted = probability >= k / 100
        overlap = float((predicted & truth).sum())
        f_measure = 2 * overlap / max(1.0, float(predicted.sum() + truth.sum()))
        if f_measure > best:
            best, found = f_measure, k / 100
    return found, best


def threshold_on_scenes(probability: Tensor, outline: Tensor, known: Tensor) -> float:
    """The lowest k/100 with 0.99 of the best F-measure on composed scenes, as `trace-sdk evaluate` counts it.

    Thinned, within its tolerance: over a wide range that F-measure is the same, and the edges of photos are weaker than
    those of what was pasted, so the low end of the range suits both.

    Args:
        probability: float [N, S, S] in [0, 1]. outline: bool [N, S, S], on and beside those of what was pasted.
        known: bool [N, S, S], where it is known whether there is an edge.
    """
    counts = []
    for edges, band, judged in zip(*(part.cpu().numpy() for part in (probability, outline, known)), strict=True):
        counts.append(count_edges(np.where(judged, thin_ridges(edges), np.float32(0)), [thin_lines(band)]))
    total = added_up(counts)
    f_measures = harmonic_mean(total.precision, total.recall)
    return (int(np.argmax(f_measures >= AS_GOOD * f_measures.max())) + 1) / 100


def rise_to_mean(logits: Tensor, mean: float) -> float:
    """What to add to all `logits` [n] so that their probabilities have this mean, in [−10, 10]; by bisection."""
    low, high = -10.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        if float((logits + middle).sigmoid().mean()) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2
