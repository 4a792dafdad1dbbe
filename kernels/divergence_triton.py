"""Triton kernel behind `divergence`: one token a program, which reads the map's rows of its neighbours."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import LN2

_LN2 = tl.constexpr(LN2)


def launch_abdiv(
    strip: Tensor, grid: tuple[int, int], held_first: int, first: int, last: int, neighbourhood: int, keys: int = 1024
) -> Tensor:
    """ABDiv of image rows first … last: float32 [B, last − first, W], from a strip that begins at `held_first`.

    `keys` are read at a time.
    """
    result = strip.new_empty((strip.shape[0], last - first, grid[1]), dtype=torch.float32)
    _abdiv[((last - first) * grid[1], strip.shape[0])](
        strip, result, *strip.stride(), *grid, held_first, first, last - first, strip.shape[2], neighbourhood, keys,
        num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def place(down, right, height, width, held_first):
    """Row of the strip that holds a token, moved to the last one inside the grid."""
    down = tl.minimum(tl.maximum(down, 0), height - 1)
    right = tl.minimum(tl.maximum(right, 0), width - 1)
    return ((down - held_first) * width + right).to(tl.int64)


@triton.jit
def part_of_kl(base, ahead, behind, row_stride, key_stride, key, tokens):
    """2^p · (p − q) at some keys of two rows."""
    p = tl.load(base + ahead * row_stride + key * key_stride, mask=key < tokens, other=0.0).to(tl.float32)
    q = tl.load(base + behind * row_stride + key * key_stride, mask=key < tokens, other=0.0).to(tl.float32)
    return tl.where(key < tokens, tl.exp2(p) * (p - q), 0.0)


@triton.jit
def _abdiv(strip, result, s_batch, s_row, s_key, height, width, held_first, first, wanted, tokens,
           NEIGHBOURS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0)
    i, j = first + token // width, token % width
    base = strip + batch * s_batch
    below, above = place(i + 1, j, height, width, held_first), place(i - 1, j, height, width, held_first)
    right, left = place(i, j + 1, height, width, held_first), place(i, j - 1, height, width, held_first)
    low_right, low_left = place(i + 1, j + 1, height, width, held_first), place(i + 1, j - 1, height, width, held_first)
    up_right, up_left = place(i - 1, j + 1, height, width, held_first), place(i - 1, j - 1, height, width, held_first)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        total += part_of_kl(base, below, above, s_row, s_key, key, tokens)
        total += part_of_kl(base, right, left, s_row, s_key, key, tokens)
        if NEIGHBOURS == 8:
            total += part_of_kl(base, low_right, up_left, s_row, s_key, key, tokens)
            total += part_of_kl(base, low_left, up_right, s_row, s_key, key, tokens)
    tl.store(result + (batch * wanted * width + token), tl.sum(total, 0) * _LN2)
