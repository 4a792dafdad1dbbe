"""What the edges say about outlines: how strong one is, and which parts of another would be better.

Edges are wrong often, inside things above all, so a change has to show more than a line that happens to be there. With
imperfect edges small moves of an outline are right where large ones are not; what a mask lacks is right more often than
what it is to lose; and a hole that no edge surrounds is no hole. The constants were chosen on photos, see
docs/instances.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label, maximum_filter

from trace_sdk.instances.boxed import box_of, widened

OPENING = 0.4  # share of new lines up to which a change closes a hole or a notch
CLOSED = 0.5  # log-odds of the line around a hole, above those inside, up to which it is no border
MOUTH = 3.5  # how much less it is for a notch, for each share of its line that is new
NEAR = 0.1  # how far an outline may move easily: mean of the part that moves, to the radius of a disc like the mask
WIDER = 1.1  # log-odds of an outline moved outwards, above those of the old one
NARROWER = 2.2  # and of one moved inwards
FAR = 4.5  # and how much more where it moves further
BETWEEN = 0.1  # how far a level lies from the inside to the outline under which a line is no border
SHARED = 0.5  # least length of a line between two masks, to the side of the smaller one
STRIP = range(3, 9)  # beside a line, pixels
QUIET = 0.05  # lower probabilities are as good as none
SURE = 0.99  # beyond which log-odds grow no more


def outline_strength(mask: NDArray[np.bool_], probability: NDArray[np.float32]) -> float:
    """Mean edge probability along the outline of a mask, of each pixel pair the larger; 0 without an outline."""
    box = box_of(mask)
    mask, probability = mask[box], probability[box]
    total, length = 0.0, 0
    for here, there in NEIGHBOURS:
        crossed = _places(mask[here] != mask[there])
        total += float(np.maximum(probability[here][crossed], probability[there][crossed]).sum(dtype=np.float64))
        length += len(crossed[0])
    return total / length if length else 0.0


def log_odds(probability: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """ln(p / (1 − p)), with p kept within SURE."""
    within = np.clip(probability, 1 - SURE, SURE)
    return np.asarray(np.log(within / (1 - within)))


def line_between(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels in or beside both of two masks, bool [h, w]: two wide where they touch."""
    return _grown(one) & _grown(other)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the pixels beside it."""
    grown = mask.copy()
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        grown[here] |= mask[there]
        grown[there] |= mask[here]
    return grown


@dataclass(frozen=True)
class Strengths:
    """Mean edge probability inside a mask and along its outline."""

    inside: float
    outline: float

    @classmethod
    def of(cls, mask: NDArray[np.bool_], probability: NDArray[np.float32]) -> Strengths:
        return cls(float(probability[mask].mean()), outline_strength(mask, probability))

    @property
    def middle(self) -> float:
        """From which a line is a border rather than not."""
        return (self.inside + self.outline) / 2


def border_evidence(mask: NDArray[np.bool_], line: NDArray[np.bool_], probability: NDArray[np.float32]) -> float:
    """How much a line through a mask looks like a border in it: negative where it looks like what is around it.

    The log-odds of the edge probability on the line, its lower quartile, above those around: the mean of those inside
    the mask and of the median of a strip to both sides of the line. A border holds all along; a line that edges cross,
    or follow for a while, is strong on average only; and where everything is full of edges, one more is no border.

    Args:
        mask: bool [h, w]. line: bool [h, w], see `line_between`, not empty. probability: float32 [h, w].
    """
    box = widened(box_of(line, 0), STRIP.stop, line.shape)
    # The edge may be one pixel wide and lie beside the line's middle.
    nearby, near_line = maximum_filter(probability[box], 3), line[box]
    close, wide = (maximum_filter(near_line, 2 * reach + 1) for reach in (STRIP.start, STRIP.stop))
    beside = nearby[wide & ~close & mask[box]]
    strengths = Strengths.of(mask, probability)
    found = float(np.quantile(nearby[near_line], 0.25)), strengths.inside, strengths.outline
    on_line, inside, outline = (float(log_odds(max(value, QUIET))) for value in found)
    around = float(log_odds(max(float(np.median(beside)), QUIET))) if len(beside) else inside
    return on_line - (1 - BETWEEN) * (inside + around) / 2 - BETWEEN * outline


def without_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with its holes filled, bool [h, w]."""
    outside, _ = label(~np.pad(mask, 1))
    filled: NDArray[np.bool_] = (outside != outside[0, 0])[1:-1, 1:-1]
    return filled


def better_parts(
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    probability: NDArray[np.float32],
    strengths: Strengths,
    needed: float = 1,
) -> tuple[NDArray[np.bool_], float]:
    """A mask with those connected parts of a change that the edges speak for, and how much they do.

    A part is taken if it closes a hole or a notch whose line is no border: hardly above the inside by log-odds, the
    less the more of its line is new. Or if it moves the outline to a stronger line: by log-odds of WIDER where the mask
    grows only, else of NARROWER, and FAR more where it moves further than NEAR.

    Args:
        before, after: bool [h, w], `before` not empty. probability: float32 [h, w]. strengths: of `before`.
        needed: share of WIDER and NARROWER that will do, see `snapping`.

    Returns:
        bool [h, w], and the sum over what the taken parts add to the outline of the probability above the middle level,
        less that over what they remove.
    """
    box = box_of(before != after)
    area = float(np.count_nonzero(before))
    whole, before, after, probability = before, before[box], after[box], probability[box]
    differs = before != after
    parts, count = label(differs)
    if not count:
        return whole, 0.0
    # Lengths and strengths of lines that each part adds and removes.
    lengths, totals = np.zeros((2, count + 1)), np.zeros((2, count + 1))
    for here, there in NEIGHBOURS:
        has = after[here] != after[there]
        # Where one pixel of the pair has changed, and one part with it.
        changed = _places(has != (before[here] != before[there]))
        part = np.maximum(parts[here][changed], parts[there][changed]) + (count + 1) * ~has[changed]
        strength = np.maximum(probability[here][changed], probability[there][changed])
        lengths += np.bincount(part, minlength=2 * count + 2).reshape(2, -1)
        totals += np.bincount(part, strength, 2 * count + 2).reshape(2, -1)
    (added, removed), (new, old) = lengths, totals / np.maximum(lengths, 1)
    length = np.maximum(added + removed, 1)
    moved = parts[differs]
    grown = np.bincount(moved, after[differs], count + 1)
    areas = np.bincount(moved, minlength=count + 1)
    faint = log_odds(old) - log_odds(strengths.inside) <= CLOSED - MOUTH * added / length
    closes = (grown > 0) & (added <= OPENING * length) & faint
    near = 2 * areas / length <= NEAR * (area / np.pi) ** 0.5
    rise = needed * np.where(grown == areas, WIDER, NARROWER) + np.where(near, 0, FAR)
    moves = (added > 0) & (removed > 0) & (log_odds(new) - log_odds(old) > rise)
    taken = closes | moves
    taken[0] = False
    if not taken.any():
        return whole, 0.0
    gain = ((new - strengths.middle) * added - (old - strengths.middle) * removed)[taken].sum()
    changed_mask = whole.copy()
    changed_mask[box] = np.where(taken[parts], after, before)
    return changed_mask, float(gain)


def _places(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """What `np.nonzero` answers, in half the time."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns


NEIGHBOURS = ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:]))
