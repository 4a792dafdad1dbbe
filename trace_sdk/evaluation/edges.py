"""ODS, OIS, AP and clDice of soft edge maps by the protocol of the Berkeley segmentation benchmark.

Source: Arbelaez et al., TPAMI 2011, section 3.1, and its benchmark code; clDice after Shit et al., CVPR 2021,
eq. 1–3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import ArgumentError
from trace_sdk.evaluation.matching import BoundaryMatcher
from trace_sdk.evaluation.touching import Touching
from trace_sdk.thinning import thin_lines

MAX_DIST = 0.0075  # share of the image diagonal within which two boundary pixels may correspond
THRESHOLDS = 99
_STEPS_BETWEEN_THRESHOLDS = 100


@dataclass(frozen=True)
class EdgeCounts:
    """Boundary pixels of one image (or, added up, of a data set) at T thresholds; each field is int64 [T]."""

    predicted: NDArray[np.int64]  # pixels of the thinned binary prediction
    predicted_matched: NDArray[np.int64]  # of these, matched one-to-one to at least one annotator
    predicted_near: NDArray[np.int64]  # of these, within the tolerance of any annotator's boundary
    truth: NDArray[np.int64]  # boundary pixels, summed over annotators
    truth_matched: NDArray[np.int64]
    truth_near: NDArray[np.int64]
    # Of contacts between instances of one class (`touching.Touching`); 0 where there are none.
    contact_predicted: NDArray[np.int64]  # pixels matched to a contact, or judged
    contact_predicted_matched: NDArray[np.int64]
    contact_truth: NDArray[np.int64]
    contact_truth_matched: NDArray[np.int64]

    def __add__(self, other: EdgeCounts) -> EdgeCounts:
        return EdgeCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def recall(self) -> NDArray[np.float64]:
        """float64 [T] in [0, 1]; 0 where there is nothing to find."""
        return self.truth_matched / np.maximum(self.truth, 1)

    @property
    def precision(self) -> NDArray[np.float64]:
        """float64 [T] in [0, 1]; 0 where nothing is predicted."""
        return self.predicted_matched / np.maximum(self.predicted, 1)

    @property
    def cldice(self) -> NDArray[np.float64]:
        """float64 [T] in [0, 1]; harmonic mean of the near shares of prediction and truth."""
        return harmonic_mean(
            self.predicted_near / np.maximum(self.predicted, 1), self.truth_near / np.maximum(self.truth, 1)
        )

    @property
    def contact_recall(self) -> NDArray[np.float64]:
        """float64 [T] in [0, 1]: `recall` on contacts alone."""
        return self.contact_truth_matched / np.maximum(self.contact_truth, 1)

    @property
    def contact_precision(self) -> NDArray[np.float64]:
        """float64 [T] in [0, 1]: of the edges inside instances that touch, the share that is a contact."""
        return self.contact_predicted_matched / np.maximum(self.contact_predicted, 1)

    def at(self, index: int) -> EdgeCounts:
        """The counts at one threshold, each int64 [1]."""
        return EdgeCounts(*(getattr(self, f.name)[index : index + 1] for f in fields(self)))


@dataclass(frozen=True)
class ContactScores:
    """How well touching instances of one class are told apart.

    f: best F-measure on contacts alone at one threshold for the whole set, edges elsewhere than inside the instances
    that touch left out. precision, recall, threshold: where `f` was reached. pixels: length of all contacts.
    precisions, recalls: at each evaluated threshold, the precision of the whole maps and the recall of contacts; see
    `recall_at`.
    """

    f: float
    precision: float
    recall: float
    threshold: float
    pixels: int
    precisions: tuple[float, ...]
    recalls: tuple[float, ...]

    def recall_at(self, precision: float) -> float:
        """The highest recall of contacts at which all edges of the set together have this precision, or more.

        Interpolated between thresholds as ODS is. It compares methods that are equally careful everywhere else.
        """
        curve = _interpolated(np.array([self.precisions, self.recalls]))
        return float(curve[1][curve[0] >= precision].max(initial=0.0))


@dataclass(frozen=True)
class EdgeScores:
    """Scores of one method on one data set.

    ods: best F-measure at one threshold for the whole set, between thresholds interpolated as in the
    benchmark code. ois: F-measure of the counts added up at each image's own best threshold. ap: area under
    the precision-recall curve, see `average_precision`. cldice: see `count_edges`; at the evaluated threshold
    of best F-measure, counts added up over the set. threshold, precision, recall: where `ods` was reached,
    each in [0, 1]. images: how many images. seconds: median time of the method for one image, None if it was
    read from files. thresholds: how many were tried. max_dist: tolerance as a share of the image diagonal.
    contacts: between touching instances of one class; None where the set has none.
    """

    ods: float
    ois: float
    ap: float
    cldice: float
    threshold: float
    precision: float
    recall: float
    images: int
    thresholds: int
    max_dist: float
    seconds: float | None = None
    contacts: ContactScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, ready for JSON."""
        return asdict(self)


def threshold_values(count: int = THRESHOLDS) -> NDArray[np.float32]:
    """float32 [count]: k / (count + 1) for k = 1 … count, so 0.01 … 0.99 for the standard 99.

    Raises:
        ArgumentError: `count` < 1.
    """
    if count < 1:
        raise ArgumentError(f"thresholds is {count}; give at least 1 (the benchmark uses {THRESHOLDS}).")
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)


def count_edges(
    probability: NDArray[np.float32],
    boundaries: Sequence[NDArray[np.bool_]],
    *,
    thresholds: int = THRESHOLDS,
    max_dist: float = MAX_DIST,
    touching: Touching | None = None,
) -> EdgeCounts:
    """Match one edge map to all annotators at every threshold.

    At each threshold the binary map `probability ≥ threshold` is thinned morphologically (Guo and Hall 1989,
    as in the benchmark) and matched to each annotator in turn. A predicted pixel counts as matched when any
    annotator has a partner for it; true pixels count once for each annotator.

    clDice here: the skeleton of the prediction S_P is the thinned binary map, the skeleton of the truth S_L
    the annotator's boundary as given, and the masks V_P and V_L are these skeletons dilated by the tolerance.
    So topology precision `|S_P ∩ V_L| / |S_P|` is the share of predicted pixels with a true pixel of any
    annotator within the tolerance, topology sensitivity `|S_L ∩ V_P| / |S_L|` the share of true pixels, summed
    over annotators, with a predicted one within it (both without one-to-one matching), and clDice is their
    harmonic mean.

    Contacts are matched on their own; a predicted pixel that has no partner there is false if it lies in
    `touching.judged`.

    Args:
        probability: float [H, W] in [0, 1], soft edge map, usually after `trace_sdk.thinning.thin_ridges`.
        boundaries: one bool [H, W] map for each annotator, lines one pixel wide, at least one map.
        thresholds: how many, see `threshold_values`.
        max_dist: tolerance as a share of the image diagonal, > 0.
        touching: contacts between instances of one class, if instances are known.

    Returns:
        The counts at each threshold.

    Raises:
        ArgumentError: an array has the wrong shape, dtype or range, or `boundaries` is empty.
    """
    _check(probability, boundaries, max_dist)
    radius = max_dist * math.hypot(*probability.shape)
    matchers = [BoundaryMatcher(boundary, radius) for boundary in boundaries]
    truth = sum(int(np.count_nonzero(boundary)) for boundary in boundaries)
    contacts, contact_truth = None, 0
    if touching is not None and touching.line.any():
        contacts = BoundaryMatcher(touching.line, radius), touching.judged
        contact_truth = int(np.count_nonzero(touching.line))
    rows: list[tuple[int, ...]] = []
    previous = (0, 0, 0, truth, 0, 0, 0, 0, contact_truth, 0)
    selected = 0
    # From the top down the binary map only grows: same number of pixels, same map, same counts.
    for threshold in threshold_values(thresholds)[::-1]:
        binary = probability >= threshold
        if (size := int(np.count_nonzero(binary))) != selected:
            selected = size
            thinned = thin_lines(binary)
            previous = _count_binary(thinned, matchers, truth) + _count_contacts(thinned, contacts)
        rows.append(previous)
    return EdgeCounts(*np.array(rows[::-1], np.int64).T)


def added_up(counts: Sequence[EdgeCounts]) -> EdgeCounts:
    """The counts of a data set from those of its images, at least one."""
    return sum(counts[1:], counts[0])


def score_edges(counts: Sequence[EdgeCounts], max_dist: float = MAX_DIST, seconds: float | None = None) -> EdgeScores:
    """The scores of a data set from the counts of its images (at least one, all at the same thresholds).

    Raises:
        ArgumentError: no counts, or counts at different numbers of thresholds.
    """
    if len({len(c.predicted) for c in counts}) != 1:
        raise ArgumentError("Scores need the counts of at least one image, all at the same number of thresholds.")
    total = added_up(counts)
    values = threshold_values(len(total.predicted)).astype(np.float64)
    ods, threshold, recall, precision = best_f(values, total.recall, total.precision)
    own_best = [image.at(int(np.argmax(harmonic_mean(image.precision, image.recall)))) for image in counts]
    best = added_up(own_best)
    return EdgeScores(
        ods=ods,
        ois=float(harmonic_mean(best.precision, best.recall)[0]),
        ap=average_precision(total),
        cldice=float(total.cldice[np.argmax(harmonic_mean(total.precision, total.recall))]),
        threshold=threshold,
        precision=precision,
        recall=recall,
        images=len(counts),
        thresholds=len(values),
        max_dist=max_dist,
        seconds=seconds,
        contacts=_score_contacts(total, values),
    )


def _score_contacts(total: EdgeCounts, thresholds: NDArray[np.float64]) -> ContactScores | None:
    pixels = int(total.contact_truth[0])
    if not pixels:
        return None
    f, threshold, recall, precision = best_f(thresholds, total.contact_recall, total.contact_precision)
    curve = tuple(total.precision.tolist()), tuple(total.contact_recall.tolist())
    return ContactScores(f, precision, recall, threshold, pixels, *curve)


def best_f(
    thresholds: NDArray[np.float64], recall: NDArray[np.float64], precision: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Best F-measure along a curve of T points, each float64 [T], interpolated linearly between neighbours.

    Returns:
        F-measure, threshold, recall and precision there (the benchmark's `maxF`, 100 steps between
        neighbours).
    """
    curve = _interpolated(np.stack([thresholds, recall, precision]))
    f = harmonic_mean(curve[2], curve[1])
    best = int(np.argmax(f))
    return float(f[best]), float(curve[0, best]), float(curve[1, best]), float(curve[2, best])


def _interpolated(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points along a curve of T points [N, T], 100 linear steps between neighbours: [N, 100 · (T − 1)]."""
    if curve.shape[1] == 1:
        return curve
    share = np.linspace(0, 1, _STEPS_BETWEEN_THRESHOLDS)
    between: NDArray[np.float64] = curve[:, :-1, None] * (1 - share) + curve[:, 1:, None] * share
    return between.reshape(len(curve), -1)


def average_precision(counts: EdgeCounts) -> float:
    """Area under the precision-recall curve, in [0, 1].

    Precision is interpolated linearly between the measured recalls (the highest precision where several
    thresholds give the same recall) and averaged over recall 0, 0.01, …, 1. Above the highest measured recall
    it is 0. Below the lowest it stays as it is there, which dropping edges at random from that map would
    give; the benchmark code has 0 there, which would punish maps whose values crowd at 1.
    """
    made = counts.predicted > 0
    if not made.any():
        return 0.0
    recall, precision = counts.recall[made], counts.precision[made]
    levels, position = np.unique(recall, return_inverse=True)
    heights = np.zeros(len(levels))
    np.maximum.at(heights, position, precision)
    return float(np.interp(np.linspace(0, 1, 101), levels, heights, right=0.0).mean())


def harmonic_mean(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """2ab / (a + b), elementwise, 0 where both are 0: F-measure from precision and recall."""
    return 2 * a * b / np.maximum(a + b, np.finfo(np.float64).tiny)


def _count_binary(
    predicted: NDArray[np.bool_], matchers: Sequence[BoundaryMatcher], truth: int
) -> tuple[int, int, int, int, int, int]:
    matchings = [matcher.match(predicted) for matcher in matchers]
    return (
        int(np.count_nonzero(predicted)),
        int(np.count_nonzero(np.logical_or.reduce([m.predicted_matched for m in matchings]))),
        int(np.count_nonzero(np.logical_or.reduce([m.predicted_near for m in matchings]))),
        truth,
        sum(int(np.count_nonzero(m.truth_matched)) for m in matchings),
        sum(int(np.count_nonzero(m.truth_near)) for m in matchings),
    )


def _count_contacts(
    predicted: NDArray[np.bool_], contacts: tuple[BoundaryMatcher, NDArray[np.bool_]] | None
) -> tuple[int, int, int, int]:
    if contacts is None:
        return 0, 0, 0, 0
    matcher, judged = contacts
    matching = matcher.match(predicted)
    matched = int(np.count_nonzero(matching.predicted_matched))
    false = int(np.count_nonzero(judged[predicted] & ~matching.predicted_matched))
    return matched + false, matched, len(matching.truth_matched), int(np.count_nonzero(matching.truth_matched))


def check_edge_map(edges: NDArray[np.float32]) -> None:
    """Raises ArgumentError unless `edges` is float [H, W] with values in [0, 1]."""
    if edges.ndim != 2 or not np.issubdtype(edges.dtype, np.floating) or not edges.size:
        raise ArgumentError(f"The edge map is {edges.dtype} {list(edges.shape)}; give a float array [H, W].")
    if not (np.isfinite(edges).all() and edges.min() >= 0 and edges.max() <= 1):
        raise ArgumentError("The edge map has values that are not in [0, 1]; scale it, and remove NaN.")


def _check(probability: NDArray[np.float32], boundaries: Sequence[NDArray[np.bool_]], max_dist: float) -> None:
    check_edge_map(probability)
    if not boundaries:
        raise ArgumentError("There is no boundary map to compare with; give one bool [H, W] map for each annotator.")
    for boundary in boundaries:
        if boundary.shape != probability.shape:
            raise ArgumentError(
                f"The edge map is {list(probability.shape)} but a boundary map is {list(boundary.shape)}; "
                "make the edge map as large as the image."
            )
    if not 0 < max_dist < 1:
        raise ArgumentError(f"max_dist is {max_dist}; give a share of the image diagonal, for example {MAX_DIST}.")
