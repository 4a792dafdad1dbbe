from __future__ import annotations

import numpy as np
import pytest

from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.outlines import QUIET, log_odds
from trace_sdk.instances.snapping import LEAST, above_surroundings, evidence_needed, snap


def test_snap_takes_pieces_that_lie_in_the_mask_by_more_than_half() -> None:
    pieces = (np.indices((40, 40))[1] // 10 + 4 * (np.indices((40, 40))[0] // 20)).astype(np.int32)  # 20 × 10 each
    mask = np.zeros((40, 40), np.bool_)
    mask[0:20, 0:23] = True  # half of what is near of the third column
    mask[20, 0:10] = True  # and a quarter of that below
    expected = np.zeros((40, 40), np.bool_)
    expected[0:20, 0:20] = True
    assert (snap(BoxedMask.of(mask), pieces).within((slice(0, 40), slice(0, 40))) == expected).all()


def test_loose_masks_need_less_evidence_than_tight_ones() -> None:
    edges = np.zeros((80, 120), np.float32)
    edges[20:61, [20, 60, 100]] = edges[[20, 60], 20:101] = 1  # two things side by side
    odds = log_odds(np.maximum(edges, QUIET)).astype(np.float32)
    tight = BoxedMask(np.s_[20:61, 20:60], np.ones((41, 40), np.bool_))
    loose = BoxedMask(np.s_[23:58, 23:57], np.ones((35, 34), np.bool_))
    for mask, needed in ((tight, 1.0), (loose, LEAST)):
        found = above_surroundings(mask, tight, odds)
        assert found[1] > 1
        assert evidence_needed([found] * 5) == pytest.approx(needed)
    # A crowd of tight ones keeps a loose one among them from moving freely.
    one = [above_surroundings(loose, tight, odds)]
    assert evidence_needed([above_surroundings(tight, tight, odds)] * 9 + one) == pytest.approx(1)
    assert evidence_needed([]) == pytest.approx(1)
    # On ridges nearby an outline may have as good as nothing, or less.
    assert evidence_needed([(9.0, -0.2)]) == 1 and evidence_needed([(-9.0, -0.2)]) == LEAST
