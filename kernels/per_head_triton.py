"""Triton kernels behind `per_head`: attention with V = K that keeps its log-sum-exp, then the pairs of neighbours."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import LN2, LOG2E
from trace_sdk.kernels.tiles_triton import Tile, exact_dots, fitted, load_tile, scores_of, split_width, tiles_of

_LN2 = tl.constexpr(LN2)


def default_tile(query: Tensor) -> Tile:
    """At most 3 % slower than the fastest one of each of six layers on an H100."""
    if query.dtype == torch.float32 or query.shape[-1] > 128:
        return fitted(Tile(32, 32, warps=4, stages=2), query)
    return fitted(Tile(64, 128, warps=4, stages=3), query)


def launch_mean_key(query: Tensor, key: Tensor, scale: float, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """k̄ float32 [B, heads, N, d] and log-sum-exp float32 [B, heads, N]; each key is read once for both products."""
    batch, heads, queries, width = query.shape
    mean_key = query.new_empty((batch, heads, queries, width), dtype=torch.float32)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    tile = tile or default_tile(query)
    _mean_key[(triton.cdiv(queries, tile.queries), batch * heads)](
        *tiles_of(query, tile.queries), *tiles_of(key, tile.keys), mean_key, lse, heads, queries, key.shape[2],
        scale * LOG2E, width, *split_width(query), exact_dots(query), tile.queries, tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return mean_key, lse


def launch_head_divergence(
    query: Tensor, mean_key: Tensor, lse: Tensor, grid: tuple[int, int], scale: float, symmetric: bool
) -> Tensor:
    """[B, 2·heads, H, W] float32, see `per_head.per_head_divergence`; `mean_key` and `lse` are contiguous."""
    batch, heads, tokens, width = query.shape
    result = query.new_empty((batch, 2 * heads, *grid), dtype=torch.float32)
    tile = 32
    _head_divergence[(triton.cdiv(tokens, tile), batch * heads)](
        query, mean_key, lse, result, *query.stride(), heads, *grid, scale, width, triton.next_power_of_2(width),
        symmetric, tile, num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def store_part(base, x, rows, limit, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    column = FROM + tl.arange(0, WIDTH)
    where = base + rows.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(where, x, mask=(rows[:, None] < limit) & (column[None, :] < D))


@triton.jit
def _mean_key(query1, query2, key1, key2, mean_key, lse, heads, queries, keys, scale2, D: tl.constexpr,
              FIRST: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr, QUERIES: tl.constexpr,
              KEYS: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first_row = tl.program_id(0) * QUERIES
    rows = first_row + tl.arange(0, QUERIES)
    q1, q2 = load_tile(query1, query2, batch, head, first_row, QUERIES, FIRST, REST, EXACT)
    mean1 = tl.zeros([QUERIES, FIRST], tl.float32)
    if REST > 0:
        mean2 = tl.zeros([QUERIES, REST], tl.float32)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        k1, k2 = load_tile(key1, key2, batch, head, start, KEYS, FIRST, REST, EXACT)
        columns = start + tl.arange(0, KEYS)
        scores = scores_of(q1, q2, k1, k2, REST)
        exponent = tl.where(columns[None, :] < keys, scores * scale2, float("-inf"))
        new = tl.maximum(most, tl.max(exponent, 1))
        shrink = tl.exp2(most - new)
        probability = tl.exp2(exponent - new[:, None])
        total = total * shrink + tl.sum(probability, 1)
        mean1 = tl.dot(probability.to(k1.dtype), k1, mean1 * shrink[:, None], input_precision="tf32x3")
        if REST > 0:
            mean2 = tl.dot(probability.to(k2.dtype), k2, mean2 * shrink[:, None], input_precision="tf32x3")
        most = new
    out = mean_key + pair * queries * D
    store_part(out, mean1 / total[:, None], rows, queries, D, 0, FIRST)
    if REST > 0:
        store_part(out, mean2 / total[:, None], rows, queries, D, FIRST, REST)
    tl.store(lse + pair * queries + rows, (most + tl.log2(total)) * _LN2, mask=rows < queries)


@triton.jit
def difference(base, ahead, behind, row_stride, column, width_stride, inside):
    """Rows ahead and their difference to those behind: two of [tokens, D] float32."""
    at_ahead = tl.load(
        base + ahead.to(tl.int64)[:, None] * row_stride + column[None, :] * width_stride, mask=inside, other=0.0
    )
    at_behind = tl.load(
        base + behind.to(tl.int64)[:, None] * row_stride + column[None, :] * width_stride, mask=inside, other=0.0
    )
    return at_ahead.to(tl.float32), at_ahead.to(tl.float32) - at_behind.to(tl.float32)


@triton.jit
def _head_divergence(query, mean_key, lse, result, q_batch, q_head, q_row, q_width, heads, height, width, scale,
                     D: tl.constexpr, PADDED: tl.constexpr, SYMMETRIC: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    count = height * width
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i, j = token // width, token % width
    column = tl.arange(0, PADDED)
    inside = (token[:, None] < count) & (column[None, :] < D)
    q_base = query + batch * q_batch + head * q_head
    k_base = mean_key + pair * count * D
    l_base = lse + pair * count
    for direction in tl.static_range(2):
        if direction == 0:
            ahead, behind = tl.minimum(i + 1, height - 1) * width + j, tl.maximum(i - 1, 0) * width + j
        else:
            ahead, behind = i * width + tl.minimum(j + 1, width - 1), i * width + tl.maximum(j - 1, 0)
        _, query_step = difference(q_base, ahead, behind, q_row, column, q_width, inside)
        mean_ahead, mean_step = difference(k_base, ahead, behind, D, column, 1, inside)
        if SYMMETRIC:
            divergence = tl.sum(query_step * mean_step, 1) * scale
        else:
            lse_ahead = tl.load(l_base + ahead, mask=token < count, other=0.0)
            lse_behind = tl.load(l_base + behind, mask=token < count, other=0.0)
            divergence = tl.sum(query_step * mean_ahead, 1) * scale - lse_ahead + lse_behind
        where = result + ((batch * 2 + direction) * heads + head) * count + token
        tl.store(where, divergence, mask=token < count)
