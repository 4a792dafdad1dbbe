"""Every formula of the teacher against an independent float64 computation in numpy, peaky attention included."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError
from trace_sdk.teacher.attention import AttentionAverage, log_mean_attention, upsample_map
from trace_sdk.teacher.boundary import abdiv, abdiv_per_head, per_head_divergence, row_kl
from trace_sdk.teacher.emergence import emergence_point, schedule, temporal_kl
from trace_sdk.teacher.pseudo_labels import ternary_labels

SMOOTH, PEAKY, VERY_PEAKY = 1.2, 3.6, 12.0


def attention(
    std: float, grid: tuple[int, int], heads: int = 3, width: int = 16, seed: int = 0, batch: int = 1
) -> SelfAttention:
    """Random float32 Q and K whose scores have about this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, grid[0] * grid[1], width, generator=generator).unbind(0)
    return SelfAttention(0, query * math.sqrt(std), key * math.sqrt(std), grid, width**-0.5)


def softmax64(a: SelfAttention) -> np.ndarray:
    """Per-head maps in float64: [B, heads, N, N]."""
    scores = a.query.numpy().astype(np.float64) @ a.key.numpy().astype(np.float64).swapaxes(-1, -2) * a.scale
    exponent = np.exp(scores - scores.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def kl64(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def abdiv64(maps: np.ndarray, grid: tuple[int, int], eight: bool) -> np.ndarray:
    """ABDiv of one N×N map by the formula, token by token."""
    height, width = grid
    result = np.zeros(grid)
    directions = [(1, 0), (0, 1)] + ([(1, 1), (1, -1)] if eight else [])
    for i in range(height):
        for j in range(width):
            for di, dj in directions:
                ahead = (min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1))
                behind = (min(max(i - di, 0), height - 1), min(max(j - dj, 0), width - 1))
                result[i, j] += kl64(maps[ahead[0] * width + ahead[1]], maps[behind[0] * width + behind[1]])
    return result


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
def test_head_mean_is_the_log_of_the_mean_probability(std: float) -> None:
    a = attention(std, (5, 7), batch=2)
    expected = softmax64(a).mean(1)
    got = log_mean_attention(a.query, a.key, a.scale).double().numpy()
    np.testing.assert_allclose(np.exp(got), expected, rtol=2e-4, atol=1e-30)
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
@pytest.mark.parametrize("neighbourhood", [4, 8])
@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (6, 1), (2, 2)])
def test_abdiv_against_the_formula(std: float, neighbourhood: int, grid: tuple[int, int]) -> None:
    a = attention(std, grid)
    expected = abdiv64(softmax64(a).mean(1)[0], grid, neighbourhood == 8)
    got = abdiv(log_mean_attention(a.query, a.key, a.scale), grid, neighbourhood)[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
def test_per_head_forms_against_the_formula(std: float) -> None:
    a = attention(std, (4, 6))
    maps = softmax64(a)[0]
    height, width = a.grid
    both = np.zeros((2, 6, height, width))  # one-way and symmetric; vertical then horizontal, by head
    for head in range(3):
        for axis, (di, dj) in enumerate([(1, 0), (0, 1)]):
            for i in range(height):
                for j in range(width):
                    p = maps[head, min(i + di, height - 1) * width + min(j + dj, width - 1)]
                    q = maps[head, max(i - di, 0) * width + max(j - dj, 0)]
                    both[:, axis * 3 + head, i, j] = kl64(p, q), kl64(p, q) + kl64(q, p)
    np.testing.assert_allclose(per_head_divergence(a, symmetric=False)[0], both[0], rtol=2e-3, atol=2e-4 * std)
    np.testing.assert_allclose(per_head_divergence(a, symmetric=True)[0], both[1], rtol=2e-3, atol=2e-4 * std)
    np.testing.assert_allclose(
        abdiv_per_head(a)[0], both[0].reshape(2, 3, height, width).mean(1).sum(0), rtol=2e-3, atol=2e-4 * std
    )


def test_per_head_form_is_never_below_the_averaged_form() -> None:
    a = attention(PEAKY, (6, 6))
    averaged = abdiv(log_mean_attention(a.query, a.key, a.scale), a.grid)
    assert (abdiv_per_head(a) >= averaged - 1e-4).all()


def test_one_head_makes_both_forms_equal() -> None:
    a = attention(PEAKY, (6, 5), heads=1)
    averaged = abdiv(log_mean_attention(a.query, a.key, a.scale), a.grid)
    torch.testing.assert_close(abdiv_per_head(a), averaged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
def test_temporal_kl_is_the_mean_over_rows(std: float) -> None:
    a, b = attention(std, (4, 5)), attention(std, (4, 5), seed=1)
    p, q = softmax64(a).mean(1)[0], softmax64(b).mean(1)[0]
    expected = np.mean([kl64(p[row], q[row]) for row in range(20)])
    got = temporal_kl(log_mean_attention(a.query, a.key, a.scale), log_mean_attention(b.query, b.key, b.scale))
    np.testing.assert_allclose(got.item(), expected, rtol=1e-4)


def test_kl_direction_is_previous_against_current() -> None:
    previous, current = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    assert temporal_kl(previous, current).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_constant_attention_has_no_divergence() -> None:
    uniform = torch.full((1, 30, 30), -math.log(30))
    assert abdiv(uniform, (5, 6), 8).abs().max() == 0
    same_row = torch.randn(1, 1, 30).log_softmax(-1).expand(1, 30, 30)
    assert abdiv(same_row, (5, 6)).abs().max() == 0


@given(st.integers(0, 1000), st.sampled_from([SMOOTH, PEAKY, VERY_PEAKY]))
@settings(max_examples=20, deadline=None)
def test_kl_is_never_negative(seed: int, std: float) -> None:
    a = attention(std, (4, 4), seed=seed)
    rows = log_mean_attention(a.query, a.key, a.scale)
    assert (row_kl(rows, rows.flip(1)) >= -1e-5).all()
    assert row_kl(rows, rows).abs().max() == 0


@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_permuting_heads_changes_nothing(order: list[int]) -> None:
    a = attention(PEAKY, (5, 4), heads=4)
    b = SelfAttention(0, a.query[:, order], a.key[:, order], a.grid, a.scale)
    torch.testing.assert_close(
        abdiv(log_mean_attention(a.query, a.key, a.scale), a.grid),
        abdiv(log_mean_attention(b.query, b.key, b.scale), b.grid),
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(abdiv_per_head(a), abdiv_per_head(b), atol=1e-4, rtol=1e-4)


def test_mirrored_attention_gives_mirrored_edges() -> None:
    """The symmetric form mirrors exactly; the one-way KL becomes the KL of the pair the other way round."""
    a = attention(PEAKY, (5, 6))
    mirrored = SelfAttention(
        0, *(x.unflatten(2, a.grid).flip(3).flatten(2, 3) for x in (a.query, a.key)), a.grid, a.scale
    )
    torch.testing.assert_close(
        per_head_divergence(mirrored, symmetric=True),
        per_head_divergence(a, symmetric=True).flip(-1),
        atol=2e-4,
        rtol=1e-3,
    )
    forward = abdiv64(softmax64(mirrored).mean(1)[0], a.grid, False)
    np.testing.assert_allclose(
        abdiv(log_mean_attention(mirrored.query, mirrored.key, a.scale), a.grid)[0],
        forward,
        rtol=1e-3,
        atol=1e-5,
    )


def test_two_regions_have_their_edge_between_them() -> None:
    """Left half attends to the left, right half to the right: ABDiv peaks on the two columns at the seam."""
    side = torch.arange(8).repeat(6) < 4
    rows = torch.where(side[:, None] == side[None], 0.0, -6.0).log_softmax(-1)[None]
    edges = abdiv(rows, (6, 8))[0]
    assert (edges[:, [3, 4]] > 1).all()
    assert edges[:, [0, 1, 2, 5, 6, 7]].abs().max() < 1e-5


def test_upsampled_maps_stay_distributions_and_keep_their_place() -> None:
    a = attention(SMOOTH, (4, 3))
    coarse = log_mean_attention(a.query, a.key, a.scale)
    fine = upsample_map(coarse, (4, 3), (8, 6)).exp()
    torch.testing.assert_close(fine.sum(-1), torch.ones(1, 48))
    column = torch.zeros(1, 12, 12)
    column[:, :, 7] = 1  # all attention on coarse token (2, 1)
    placed = upsample_map(column.log(), (4, 3), (8, 6)).exp()[0, 0].view(8, 6)
    assert placed[4:6, 2:4].sum() > 0.5 and divmod(int(placed.argmax()), 6)[0] in (4, 5)


def test_average_over_blocks_of_two_grids() -> None:
    fine, coarse = attention(SMOOTH, (4, 4)), attention(SMOOTH, (2, 2), seed=5)
    average = AttentionAverage((4, 4))
    average.add(fine)
    average.add(SelfAttention(1, coarse.query, coarse.key, coarse.grid, coarse.scale))
    up = upsample_map(torch.from_numpy(softmax64(coarse).mean(1)).log(), (2, 2), (4, 4)).exp().numpy()
    np.testing.assert_allclose(
        average.log_mean().exp().numpy(), (softmax64(fine).mean(1) + up) / 2, rtol=1e-4, atol=1e-7
    )


def test_average_without_any_block_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="No self-attention block"):
        AttentionAverage((4, 4), blocks={9}).log_mean()


def test_emergence_is_the_largest_kl_inside_the_window() -> None:
    timesteps, kl = (0.1, 0.2, 0.3, 0.4, 0.9), (0.1, 0.5, 0.7, 0.2, 3.0)
    assert emergence_point(timesteps, kl, (0.0, 0.6)).t_star == 0.3
    assert emergence_point(timesteps, kl, (0.0, 1.0)).t_star == 0.9
    with pytest.raises(ArgumentError, match="window"):
        emergence_point(timesteps, kl, (0.5, 0.6))


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


def test_neighbourhood_must_be_known() -> None:
    with pytest.raises(ArgumentError, match="4 or 8"):
        abdiv(torch.zeros(1, 4, 4), (2, 2), 6)
