"""Triton kernels behind `upsample`: what each coarse row sums to once enlarged, then a part of a fine row a program."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import FLOOR, HEADROOM

_HEADROOM, _FLOOR = tl.constexpr(HEADROOM), tl.constexpr(FLOOR)
KEYS = 256


def launch_upsample(
    coarse: Tensor,
    grid: tuple[int, int],
    finest: tuple[int, int],
    rows: Tensor,
    weight: float,
    accumulate: bool,
    out: Tensor,
) -> None:
    """See `upsample.upsample_attention`."""
    batch, wanted, keys = out.shape
    _upsample[(triton.cdiv(keys, KEYS), wanted, batch)](
        coarse, row_mass(coarse, grid, finest), rows, out, *coarse.stride(), *out.stride(), *grid, *finest, weight,
        accumulate, KEYS, num_warps=4,
    )  # fmt: skip


def row_mass(coarse: Tensor, grid: tuple[int, int], finest: tuple[int, int]) -> Tensor:
    """Sum of each coarse row over the fine keys: float32 [B, n]. A fine row's sum is the same mixture of these."""
    mass = coarse.new_empty(coarse.shape[:2], dtype=coarse.new_empty(0).float().dtype)
    _row_mass[(coarse.shape[1], coarse.shape[0])](
        coarse, mass, key_shares(grid, finest, coarse), *coarse.stride(), coarse.shape[1], KEYS, num_warps=4
    )
    return mass


def key_shares(grid: tuple[int, int], finest: tuple[int, int], like: Tensor) -> Tensor:
    """How many fine keys' worth of weight each coarse key gets: float32 [n]."""
    import torch

    from trace_sdk.kernels.upsample import source_positions

    axes = []
    for coarse, fine in zip(grid, finest, strict=True):
        low, high, share = source_positions(torch.arange(fine, device=like.device), coarse, fine)
        axis = torch.zeros(coarse, device=like.device)
        axes.append(axis.index_add_(0, low, 1 - share).index_add_(0, high, share))
    return (axes[0][:, None] * axes[1][None]).flatten()


@triton.jit
def _row_mass(coarse, mass, shares, c_batch, c_row, c_key, tokens, KEYS: tl.constexpr):
    batch, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        log = tl.load(coarse + batch * c_batch + row * c_row + key * c_key, mask=key < tokens, other=float("-inf"))
        share = tl.load(shares + key, mask=key < tokens, other=0.0)
        total += tl.exp2(log.to(tl.float32)) * share
    tl.store(mass + batch * tokens + row, tl.sum(total, 0))


@triton.jit
def between(fine, coarse_size, fine_size):
    """As `upsample.source_positions`."""
    where = tl.maximum((fine.to(tl.float32) + 0.5) * (coarse_size / fine_size) - 0.5, 0.0)
    low = tl.minimum(where.to(tl.int32), coarse_size - 1)
    return low, tl.minimum(low + 1, coarse_size - 1), where - low


@triton.jit
def mixed_keys(base, c_row, c_key, row, top, bottom, y, left, right, x, width):
    """One coarse row at fine keys: 2^headroom times the probability, bilinear in the four coarse keys around."""
    start = base + row.to(tl.int64) * c_row
    top_left = tl.exp2(tl.load(start + (top * width + left) * c_key).to(tl.float32) + _HEADROOM)
    top_right = tl.exp2(tl.load(start + (top * width + right) * c_key).to(tl.float32) + _HEADROOM)
    bottom_left = tl.exp2(tl.load(start + (bottom * width + left) * c_key).to(tl.float32) + _HEADROOM)
    bottom_right = tl.exp2(tl.load(start + (bottom * width + right) * c_key).to(tl.float32) + _HEADROOM)
    return (1 - y) * ((1 - x) * top_left + x * top_right) + y * ((1 - x) * bottom_left + x * bottom_right)


@triton.jit
def _upsample(coarse, mass, rows, out, c_batch, c_row, c_key, o_batch, o_row, o_key, height, width, fine_height,
              fine_width, weight, ACCUMULATE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = tl.load(rows + tl.program_id(1)).to(tl.int32)
    top, bottom, y = between(row // fine_width, height, fine_height)
    left, right, x = between(row % fine_width, width, fine_width)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = key < fine_height * fine_width
    held = tl.where(inside, key, 0)
    key_top, key_bottom, key_y = between(held // fine_width, height, fine_height)
    key_left, key_right, key_x = between(held % fine_width, width, fine_width)
    mixed = tl.zeros([KEYS], tl.float32)
    total = 0.0
    base = coarse + batch * c_batch
    masses = mass + batch * height * width
    for corner in tl.static_range(4):
        if corner < 2:
            source_row, row_share = top * width, 1 - y
        else:
            source_row, row_share = bottom * width, y
        if corner % 2 == 0:
            source, share = source_row + left, row_share * (1 - x)
        else:
            source, share = source_row + right, row_share * x
        mixed += share * mixed_keys(
            base, c_row, c_key, source, key_top, key_bottom, key_y, key_left, key_right, key_x, width
        )
        total += share * tl.load(masses + source)
    mixed *= weight / total
    where = out + batch * o_batch + tl.program_id(1).to(tl.int64) * o_row + key * o_key
    if ACCUMULATE:
        mixed += tl.exp2(tl.load(where, mask=inside, other=0.0).to(tl.float32) + _HEADROOM)
    tl.store(where, tl.maximum(tl.log2(mixed) - _HEADROOM, _FLOOR), mask=inside)
