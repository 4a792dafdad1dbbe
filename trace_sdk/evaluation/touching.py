"""Where instances of one class touch: the lines that instance edges are for and that semantics cannot give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.thinning import thin_lines

GAP = 0.0075  # share of the diagonal within which two outlines are one line: the tolerance of the matching


@dataclass(frozen=True, eq=False)
class Touching:
    """Contacts of one image.

    Attributes:
        line: bool [H, W], one pixel wide, half-way between two instances of one class that touch.
        judged: bool [H, W], where an edge that is no contact is false: inside the instances that touch, away from
            their other outlines.
    """

    line: NDArray[np.bool_]
    judged: NDArray[np.bool_]


def find_touching(ids: NDArray[np.integer[Any]], classes: Mapping[int, Any]) -> Touching:
    """Contacts of instances of one class.

    Outlines drawn by hand leave gaps or overlap, so two instances touch where the gap between them is at most GAP of
    the diagonal, and the line runs in its middle.

    Args:
        ids: integer [H, W], 0 = background.
        classes: of each id.
    """
    from scipy.ndimage import distance_transform_edt

    reach = GAP * math.hypot(*ids.shape)
    away, (y, x) = distance_transform_edt(ids == 0, return_indices=True)
    grown = np.where(away <= reach / 2, ids[y, x], 0)
    present, index = np.unique(grown, return_inverse=True)
    index = index.reshape(ids.shape)
    numbers: dict[Any, int] = {}
    kind = np.array([0 if i == 0 else numbers.setdefault(classes[int(i)], len(numbers) + 1) for i in present])

    line, touching = np.zeros(ids.shape, np.bool_), np.zeros(len(present), np.bool_)
    for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        a, b = index[here], index[there]
        contact = (a != b) & (kind[a] == kind[b])
        line[here] |= contact
        touching[a[contact]] = touching[b[contact]] = True
    line = thin_lines(line)

    border = np.zeros(ids.shape, np.bool_)
    border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    border[:-1] |= ids[:-1] != ids[1:]
    if line.any():
        border &= distance_transform_edt(~line) > reach / 2 + 1.5  # the facing outlines are the contact itself
    judged = touching[index]
    if border.any():
        judged &= distance_transform_edt(~border) > reach
    return Touching(line, judged)
