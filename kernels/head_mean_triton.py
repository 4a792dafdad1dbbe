"""Triton kernels behind `head_mean`: log-sum-exp a head, then one tile of the mean map a program."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import FLOOR, HEADROOM, LN2, LOG2E
from trace_sdk.kernels.tiles_triton import Tile, exact_dots, fitted, load_tile, scores_of, split_width, tiles_of

_HEADROOM, _FLOOR, _LN2, _LOG2E = (tl.constexpr(x) for x in (HEADROOM, FLOOR, LN2, LOG2E))


def default_tile(query: Tensor) -> Tile:
    """Of the log-sum-exp: at most 15 % slower than the fastest one of each of six layers on an H100."""
    if query.dtype == torch.float32 or query.shape[-1] > 128:
        return fitted(Tile(64, 64, warps=8, stages=2), query)
    return fitted(Tile(64, 128, warps=4, stages=3), query)


def head_mean_tile(query: Tensor) -> Tile:
    """Of the head mean: at most 8 % slower than the fastest one of each of six layers on an H100."""
    if query.dtype != torch.float32 and 64 < query.shape[-1] <= 128:
        return fitted(Tile(128, 128, warps=8, stages=3), query)
    return default_tile(query)


def launch_log_sum_exp(query: Tensor, key: Tensor, scale: float, tile: Tile | None = None) -> Tensor:
    """See `head_mean.log_sum_exp`."""
    batch, heads, queries = query.shape[:3]
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    tile = tile or default_tile(query)
    _log_sum_exp[(triton.cdiv(queries, tile.queries), batch * heads)](
        *tiles_of(query, tile.queries), *tiles_of(key, tile.keys), lse, heads, queries, key.shape[2], scale * LOG2E,
        *split_width(query), exact_dots(query), tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return lse


def launch_image_log_sum_exp(
    lse: Tensor, query: Tensor, image_key: Tensor, text_key: Tensor, scale: float, tile: Tile | None = None
) -> Tensor:
    """See `head_mean.image_log_sum_exp`."""
    batch, heads, queries = query.shape[:3]
    out = query.new_empty((batch, heads, queries), dtype=torch.float32)
    tile = tile or default_tile(query)
    _image_log_sum_exp[(triton.cdiv(queries, tile.queries), batch * heads)](
        lse, *tiles_of(query, tile.queries), *tiles_of(image_key, tile.keys), *tiles_of(text_key, tile.keys), out,
        *lse.stride(), heads, queries, image_key.shape[2], text_key.shape[2], scale * LOG2E,
        *split_width(query), exact_dots(query), tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
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
    batch, heads, queries = query.shape[:3]
    keys = key.shape[2]
    tile = tile or head_mean_tile(query)
    _head_mean[(triton.cdiv(keys, tile.keys), triton.cdiv(queries, tile.queries), batch)](
        *tiles_of(query, tile.queries), *tiles_of(key, tile.keys), lse, out, *lse.stride(), *out.stride(),
        heads, queries, keys, scale * LOG2E, weight / heads,
        *split_width(query), exact_dots(query), accumulate, tile.queries, tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def row_log2_sum(q1, q2, key1, key2, batch, head, keys, scale2, FIRST: tl.constexpr, REST: tl.constexpr,
                 EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """log₂ Σ 2^(scale2·query·key) of a tile of queries, over all keys, with a running maximum."""
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        k1, k2 = load_tile(key1, key2, batch, head, start, KEYS, FIRST, REST, EXACT)
        columns = start + tl.arange(0, KEYS)
        exponent = scores_of(q1, q2, k1, k2, REST) * scale2
        exponent = tl.where(columns[None, :] < keys, exponent, float("-inf"))
        new = tl.maximum(most, tl.max(exponent, 1))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(exponent - new[:, None]), 1)
        most = new
    return most + tl.log2(total)


@triton.jit
def _log_sum_exp(query1, query2, key1, key2, lse, heads, queries, keys, scale2, FIRST: tl.constexpr, REST: tl.constexpr,
                 EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first_row = tl.program_id(0) * QUERIES
    q1, q2 = load_tile(query1, query2, batch, head, first_row, QUERIES, FIRST, REST, EXACT)
    total = row_log2_sum(q1, q2, key1, key2, batch, head, keys, scale2, FIRST, REST, EXACT, QUERIES, KEYS)
    rows = first_row + tl.arange(0, QUERIES)
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + rows, total * _LN2, mask=rows < queries)


@triton.jit
def _image_log_sum_exp(lse, query1, query2, image_key1, image_key2, text_key1, text_key2, out, l_batch, l_head, l_row,
                       heads, queries, image_keys, text_keys, scale2, FIRST: tl.constexpr, REST: tl.constexpr,
                       EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first_row = tl.program_id(0) * QUERIES
    rows = first_row + tl.arange(0, QUERIES)
    q1, q2 = load_tile(query1, query2, batch, head, first_row, QUERIES, FIRST, REST, EXACT)
    from_lse = lse + batch.to(tl.int64) * l_batch + head.to(tl.int64) * l_head
    both = tl.load(from_lse + rows * l_row, mask=rows < queries, other=0.0) * _LOG2E
    text = row_log2_sum(q1, q2, text_key1, text_key2, batch, head, text_keys, scale2, FIRST, REST, EXACT, QUERIES, KEYS)
    share = tl.where(rows < queries, tl.exp2(text - both), 0.0)
    image = both + tl.log2(1 - tl.minimum(share, 0.999999))
    if tl.max(share, 0) > 0.99:  # rare, and then for this tile alone
        summed = row_log2_sum(
            q1, q2, image_key1, image_key2, batch, head, image_keys, scale2, FIRST, REST, EXACT, QUERIES, KEYS
        )
        image = tl.where(share > 0.99, summed, image)
    tl.store(out + tl.program_id(1).to(tl.int64) * queries + rows, image * _LN2, mask=rows < queries)


@triton.jit
def _head_mean(query1, query2, key1, key2, lse, out, l_batch, l_head, l_row, o_batch, o_row, o_key,
               heads, queries, keys, scale2, weight, FIRST: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr,
               ACCUMULATE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch = tl.program_id(2)
    first_row, first_column = tl.program_id(1) * QUERIES, tl.program_id(0) * KEYS
    rows, columns = first_row + tl.arange(0, QUERIES), first_column + tl.arange(0, KEYS)
    from_lse = lse + batch.to(tl.int64) * l_batch + rows * l_row
    mean = tl.zeros([QUERIES, KEYS], tl.float32)
    for head in range(0, heads):
        q1, q2 = load_tile(query1, query2, batch, head, first_row, QUERIES, FIRST, REST, EXACT)
        k1, k2 = load_tile(key1, key2, batch, head, first_column, KEYS, FIRST, REST, EXACT)
        scores = scores_of(q1, q2, k1, k2, REST)
        less = tl.load(from_lse, mask=rows < queries, other=0.0)
        from_lse += l_head
        mean += tl.exp2(scores * scale2 - (less * _LOG2E - _HEADROOM)[:, None])
    mean *= weight
    inside = (rows[:, None] < queries) & (columns[None, :] < keys)
    where = out + batch.to(tl.int64) * o_batch + rows.to(tl.int64)[:, None] * o_row + columns[None, :] * o_key
    if ACCUMULATE:
        mean += tl.exp2(tl.load(where, mask=inside, other=0.0).to(tl.float32) + _HEADROOM)
    tl.store(where, tl.maximum(tl.log2(mean) - _HEADROOM, _FLOOR), mask=inside)
