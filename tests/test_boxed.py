from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as codec

from trace_sdk.instances.boxed import BoxedMask, box_of, overlap, union

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9))


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_run_lengths_are_those_of_the_whole_mask(mask: Any) -> None:
    if mask.any():
        assert BoxedMask.of(mask).rle(mask.shape) == codec.encode(np.asfortranarray(mask, np.uint8))


@pytest.mark.parametrize("rows", [slice(0, 6), slice(1, 6), slice(0, 5), slice(2, 4)])
def test_runs_that_reach_the_rim(rows: slice) -> None:
    """In a box of full height a run goes over from one column to the next."""
    mask = np.zeros((6, 7), np.bool_)
    mask[rows, 2:] = True
    assert BoxedMask.of(mask).rle((6, 7)) == codec.encode(np.asfortranarray(mask, np.uint8))


@settings(max_examples=60, deadline=None)
@given(MASKS, st.data())
def test_what_lies_in_another_box(mask: Any, data: Any) -> None:
    top, left = (data.draw(st.integers(0, side - 1)) for side in mask.shape)
    box = (
        slice(top, data.draw(st.integers(top, mask.shape[0]))),
        slice(left, data.draw(st.integers(left, mask.shape[1]))),
    )
    boxed = BoxedMask.of(mask)
    assert (boxed.within(box) == mask[box]).all() and boxed.area == mask.sum()


def test_a_part_of_a_picture_knows_its_place() -> None:
    part = np.zeros((4, 5), np.bool_)
    part[1:3, 2:4] = True
    boxed = BoxedMask.of(part, (10, 20))
    assert boxed.box == (slice(11, 13), slice(22, 24)) and boxed.inside.all()


def test_boxes() -> None:
    mask = np.zeros((6, 8), np.bool_)
    assert box_of(mask) == (slice(0, 0), slice(0, 0))
    mask[0, 3] = True
    assert box_of(mask, 0) == (slice(0, 1), slice(3, 4))
    assert box_of(mask, 2) == (slice(0, 3), slice(1, 6))
    one, other = (slice(0, 3), slice(2, 5)), (slice(2, 6), slice(5, 7))
    assert union([one, other]) == (slice(0, 6), slice(2, 7))
    assert overlap(one, other) == (slice(2, 3), slice(5, 5))
