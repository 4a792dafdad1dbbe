from __future__ import annotations

import numpy as np
import pytest

from trace_sdk.instances.boxed import BoxedMask
from trace_sdk.instances.splitting import cut_at_gaps

FRAME = np.zeros((80, 120), np.float32)  # an edge around rows 20 to 60, columns 20 to 100
FRAME[20:61, [20, 100]] = FRAME[[20, 60], 20:101] = 1
INSIDE = np.zeros(FRAME.shape, np.bool_)
INSIDE[20:61, 20:101] = True


@pytest.mark.parametrize(("gap", "strength", "count"), [(2, 0.8, 2), (2, 0.0, 1), (16, 0.8, 1)])
def test_a_mask_is_cut_at_a_narrow_gap_with_an_edge_in_it(gap: int, strength: float, count: int) -> None:
    """One thing behind a pole stays one, and so does one with a crack."""
    edges, mask = FRAME.copy(), INSIDE.copy()
    edges[21:60, 60 - gap // 2] = strength
    mask[:, 60 - gap // 2 : 60 + gap // 2] = False
    parts = cut_at_gaps(BoxedMask.of(mask), edges)
    assert len(parts) == count
    if count == 2:
        assert {part.box[1].start for part in parts} == {20, 61}


def test_small_parts_go_with_the_nearest() -> None:
    edges, mask = FRAME.copy(), INSIDE.copy()
    edges[20:61, 60] = 1
    mask[:, 59:61] = False
    mask[61:64, 99:101] = mask[62:64, 22:24] = True  # one touches, one doesn't
    parts = cut_at_gaps(BoxedMask.of(mask), edges)
    assert sorted(part.area for part in parts) == [41 * 39 + 4, 41 * 40 + 6]
