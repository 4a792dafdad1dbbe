"""Triton kernels behind `head_mean`: log-sum-exp a head, then one tile of the mean map a program."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import FLOOR, HEADROOM, LN2, LOG2E
from trace_sdk.kernels.tiles_triton import Tile, exact_dots, fitted, load_rows, scores_of, split_width

_HEADROOM, _FLOOR, _LN2, _LOG2E = (tl.constexpr(x) for x in (HEADROOM, FLOOR, LN2, LOG2E))
GROUP = 8  # tiles of queries that walk the keys side by side, so that they find the keys in L2


def default_tile(query: Tensor) -> Tile:
    """The largest tile that the compiler keeps in registers on sm_90, counted and not timed; see docs/kernels.md."""
    if query.dtype == torch.float32 or query.shape[-1] > 128:
        return fitted(Tile(64, 64, warps=8, stages=2), query)
    if split_width(query.shape[-1])[1]:
        return fitted(Tile(128, 64, warps=8, stages=3), query)
    return fitted(Tile(128, 128, warps=8, stages=2), query)


def launch_log_sum_exp(query: Tensor, key: Tensor, scale: float, tile: Tile | None = None) -> Tensor:
    """See `head_mean.log_sum_exp`."""
    batch, heads, queries, width = query.shape
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    tile = tile or default_tile(query)
    first, rest = split_width(width)
    _log_sum_exp[(triton.cdiv(queries, tile.queries), batch * heads)](
        query, key, lse, *query.stride(), *key.stride(), heads, queries, key.shape[2], scale * LOG2E,
        width, first, rest, exact_dots(query), tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return lse


def launch_image_log_sum_exp(
    lse: Tensor, query: Tensor, image_key: Tensor, text_key: Tensor, scale: float, tile: Tile | None = None
) -> Tensor:
    """See `head_mean.image_log_sum_exp`."""
    batch, heads, queries, width = query.shape
    out = query.new_empty((batch, heads, queries), dtype=torch.float32)
    tile = tile or default_tile(query)
    first, rest = split_width(width)
    _image_log_sum_exp[(triton.cdiv(queries, tile.queries), batch * heads)](
        lse, query, image_key, text_key, out, *lse.stride(), *query.stride(), *image_key.stride(), *text_key.stride(),
        heads, queries, image_key.shape[2], text_key.shape[2], scale * LOG2E,
        width, first, rest, exact_dots(query), tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def launch_head_mean(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    weight: float,
    accumulate: bool,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """See `head_mean.head_mean_attention`."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    tile = tile or default_tile(query)
    first, rest = split_width(width)
    _head_mean[(triton.cdiv(queries, tile.queries) * triton.cdiv(keys, tile.keys), batch)](
        query, key, lse, out, *query.stride(), *key.stride(), *lse.stride(), *out.stride(),
        heads, queries, keys, scale * LOG2E, weight / heads,
        width, first, rest, exact_dots(query), accumulate, GROUP, tile.queries, tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def row_log2_sum(q1, q2, base, keys, row_stride, width_stride, scale2, D: tl.constexpr, FIRST: tl.constexpr,
                 REST: tl.constexpr, EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """log₂ Σ 2^(scale2·query·key) of a tile of queries, over all keys, with a running maximum."""
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        exponent = scores_of(q1, q2, base, columns, keys, row_stride, width_stride, D, FIRST, REST, EXACT) * scale2
        exponent = tl.where(columns[None, :] < keys, exponent, float("-inf"))
        new = tl.maximum(most, tl.max(exponent, 1))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(exponent - new[:, None]), 1)
        most = new
    return most + tl.log2(total)


@triton.jit
def _log_sum_exp(query, key, lse, q_batch, q_head, q_row, q_width, k_batch, k_head, k_row, k_width,
                 heads, queries, keys, scale2, D: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
                 EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q_base = query + batch * q_batch + head * q_head
    q1, q2 = load_rows(q_base, rows, queries, q_row, q_width, D, FIRST, REST, EXACT)
    k_base = key + batch * k_batch + head * k_head
    total = row_log2_sum(q1, q2, k_base, keys, k_row, k_width, scale2, D, FIRST, REST, EXACT, QUERIES, KEYS)
    tl.store(lse + pair * queries + rows, total * _LN2, mask=rows < queries)


@triton.jit
def _image_log_sum_exp(lse, query, image_key, text_key, out, l_batch, l_head, l_row, q_batch, q_head, q_row, q_width,
                       k_batch, k_head, k_row, k_width, t_batch, t_head, t_row, t_width,
                       heads, queries, image_keys, text_keys, scale2, D: tl.constexpr, FIRST: tl.constexpr,
                       REST: tl.constexpr, EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q_base = query + batch * q_batch + head * q_head
    q1, q2 = load_rows(q_base, rows, queries, q_row, q_width, D, FIRST, REST, EXACT)
    both = tl.load(lse + batch * l_batch + head * l_head + rows * l_row, mask=rows < queries, other=0.0) * _LOG2E
    t_base = text_key + batch * t_batch + head * t_head
    text = row_log2_sum(q1, q2, t_base, text_keys, t_row, t_width, scale2, D, FIRST, REST, EXACT, QUERIES, KEYS)
    share = tl.where(rows < queries, tl.exp2(text - both), 0.0)
    image = both + tl.log2(1 - tl.minimum(share, 0.999999))
    if tl.max(share, 0) > 0.99:  # rare, and then for this tile alone
        k_base = image_key + batch * k_batch + head * k_head
        summed = row_log2_sum(q1, q2, k_base, image_keys, k_row, k_width, scale2, D, FIRST, REST, EXACT, QUERIES, KEYS)
        image = tl.where(share > 0.99, summed, image)
    tl.store(out + pair * queries + rows, image * _LN2, mask=rows < queries)


@triton.jit
def _head_mean(query, key, lse, out, q_batch, q_head, q_row, q_width, k_batch, k_head, k_row, k_width,
               l_batch, l_head, l_row, o_batch, o_row, o_key, heads, queries, keys, scale2, weight,
               D: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr,
               ACCUMULATE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    across, down = tl.cdiv(keys, KEYS), tl.cdiv(queries, QUERIES)
    group = tl.program_id(0) // (GROUP * across)
    in_group = min(down - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    rows = (group * GROUP + place % in_group) * QUERIES + tl.arange(0, QUERIES)
    columns = (place // in_group) * KEYS + tl.arange(0, KEYS)
    mean = tl.zeros([QUERIES, KEYS], tl.float32)
    for head in range(0, heads):
        q_base = query + batch * q_batch + head * q_head
        q1, q2 = load_rows(q_base, rows, queries, q_row, q_width, D, FIRST, REST, EXACT)
        k_base = key + batch * k_batch + head * k_head
        scores = scores_of(q1, q2, k_base, columns, keys, k_row, k_width, D, FIRST, REST, EXACT)
        less = tl.load(lse + batch * l_batch + head * l_head + rows * l_row, mask=rows < queries, other=0.0)
        mean += tl.exp2(scores * scale2 - (less * _LOG2E - _HEADROOM)[:, None])
    mean *= weight
    inside = (rows[:, None] < queries) & (columns[None, :] < keys)
    where = out + batch * o_batch + rows.to(tl.int64)[:, None] * o_row + columns[None, :] * o_key
    if ACCUMULATE:
        mean += tl.exp2(tl.load(where, mask=inside, other=0.0).to(tl.float32) + _HEADROOM)
    tl.store(where, tl.maximum(tl.log2(mean) - _HEADROOM, _FLOOR), mask=inside)
