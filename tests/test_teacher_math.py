"""What the teacher makes of the kernels' numbers: mean over blocks, t*, ternary labels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels import abdiv_reference, head_mean_attention_reference, upsample_attention_reference
from trace_sdk.teacher.attention import AttentionAverage
from trace_sdk.teacher.boundary import MeanBoundary
from trace_sdk.teacher.emergence import row_sample, schedule, search_window
from trace_sdk.teacher.pseudo_labels import ternary_labels


def blocks_of_two_grids() -> tuple[list[SelfAttention], Tensor]:
    """Blocks over 4×4 and 2×2 tokens, 16 channels a head by 4 heads, and their mean map in float64: [1, 16, 16]."""
    torch.manual_seed(0)
    blocks, maps = [], []
    for number, grid in enumerate([(4, 4), (2, 2), (4, 4)]):
        query, key = (1.5 * torch.randn(2, 1, 4, grid[0] * grid[1], 16)).unbind(0)
        blocks.append(SelfAttention(number, query, key, grid, 0.25))
        log2_map = head_mean_attention_reference(query.double(), key.double(), 0.25)
        maps.append(upsample_attention_reference(log2_map, grid, (4, 4)).exp2())
    return blocks, torch.stack(maps).mean(0)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 6, 15])])
def test_average_over_blocks_of_two_grids(rows: Tensor | None) -> None:
    blocks, expected = blocks_of_two_grids()
    average = AttentionAverage((4, 4), range(3), rows)
    for block in blocks:
        average.add(block)
    expected = expected if rows is None else expected[:, rows]
    torch.testing.assert_close(average.log2_mean().exp2().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_all", [True, False])
def test_mean_boundary_keeps_what_is_smaller(keep_all: bool) -> None:
    """Queries and keys of wide heads outweigh a map of 16×16: then one running map is kept, else they are."""
    blocks, mean = blocks_of_two_grids()
    if keep_all:  # one narrow head weighs less than the map
        blocks = [SelfAttention(0, torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 16), (8, 8), 0.25)]
        mean = head_mean_attention_reference(blocks[0].query.double(), blocks[0].key.double(), 0.25).exp2()
    boundary = MeanBoundary(blocks[0].grid, range(len(blocks)), 4)
    for block in blocks:
        boundary.add(block)
    assert bool(boundary._kept) is keep_all
    torch.testing.assert_close(
        boundary.abdiv().double(), abdiv_reference(mean.log2(), blocks[0].grid), rtol=1e-3, atol=1e-4
    )


def test_a_block_that_was_not_seen_is_an_error() -> None:
    blocks, _ = blocks_of_two_grids()
    average = AttentionAverage((4, 4), {0, 9})
    average.add(blocks[0])
    with pytest.raises(ArgumentError, match=r"1 of the self-attention blocks \[0, 9\] were seen"):
        average.log2_mean()
    with pytest.raises(ArgumentError, match="were seen"):
        MeanBoundary((4, 4), {0, 9}, 4).abdiv()


def test_search_window_holds_the_timesteps_in_it() -> None:
    timesteps = (0.1, 0.2, 0.3, 0.4, 0.9)
    assert timesteps[search_window(timesteps, (0.2, 0.6))] == (0.2, 0.3, 0.4)
    assert timesteps[search_window(timesteps, (0.0, 1.0))] == timesteps
    with pytest.raises(ArgumentError, match="window"):
        search_window(timesteps, (0.5, 0.6))


def test_row_sample_is_sorted_distinct_and_the_same_each_time() -> None:
    first, again = row_sample(100, 12, torch.device("cpu")), row_sample(100, 12, torch.device("cpu"))
    assert first is not None and again is not None and torch.equal(first, again)
    assert len(first.unique()) == 12 and first.equal(first.sort().values) and first[0] >= 0 and first[-1] < 100
    assert row_sample(100, 100, torch.device("cpu")) is None and row_sample(100, None, torch.device("cpu")) is None


def test_schedule_strides_through_a_thousand_steps() -> None:
    assert schedule(100) == tuple(i / 10 for i in range(10))
    assert len(schedule(50)) == 20
    with pytest.raises(ArgumentError):
        schedule(0)


@given(st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_ternary_rule(seed: int) -> None:
    values = np.random.default_rng(seed).gamma(2, 1, (12, 9)).astype(np.float32)
    labels, rule = ternary_labels(values)
    inner, inside = values[1:-1, 1:-1].astype(np.float64), labels[1:-1, 1:-1]
    np.testing.assert_array_equal(inside == 1, inner > inner.mean() + inner.std())
    if rule == "mu-sigma":
        np.testing.assert_array_equal(inside == 0, inner < inner.mean() - inner.std())
    assert (inside == 0).mean() >= 0.05
    ring = labels.copy()
    ring[1:-1, 1:-1] = -1
    assert (ring == -1).all()


def test_skewed_map_takes_the_quantile_rule_and_says_so() -> None:
    values = np.random.default_rng(0).exponential(1, (20, 20)).astype(np.float32) ** 3
    labels, rule = ternary_labels(values)
    assert rule == "quantile"
    assert (labels[1:-1, 1:-1] == 0).mean() == pytest.approx(0.1587, abs=0.01)


def test_flat_map_is_all_uncertain() -> None:
    labels, rule = ternary_labels(np.full((4, 4), 2.0, np.float32))
    assert rule == "flat" and (labels == -1).all()
