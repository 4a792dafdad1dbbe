"""What the Triton kernels share: how a head's width is split, and how a tile of rows is read."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: queries and keys a program, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def split_width(width: int) -> tuple[int, int]:
    """A head's width as a power of two and the rest, each at least 16: 40 → 32 + 16, 72 → 64 + 16, 128 → 128 + 0."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, (max(16, 1 << (rest - 1).bit_length()) if rest else 0)


@cache
def shared_memory(device: int) -> int:
    """Bytes of it that a program can have on a GPU. Asked once: the driver is slow to answer."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return int(properties["max_shared_mem"])


def fitted(tile: Tile, query: Tensor) -> Tile:
    """The tile halved until its queries, and keys for every stage of two loops, fit into the GPU's shared memory."""
    limit = shared_memory(query.device.index) if query.is_cuda else 227 * 1024  # sm_90
    width = sum(split_width(query.shape[-1])) * query.element_size()
    while (tile.queries + 2 * tile.stages * tile.keys) * width > limit and tile.keys > 16:
        tile = Tile(max(16, tile.queries // 2), tile.keys // 2, tile.warps, tile.stages)
    return tile


def exact_dots(x: Tensor) -> bool:
    """Whether products are taken in float32: for float32 itself, and for bfloat16, which the interpreter cannot."""
    return x.dtype == torch.float32 or (INTERPRETED and x.dtype == torch.bfloat16)


@triton.jit
def load_part(base, rows, limit, row_stride, width_stride, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
              EXACT: tl.constexpr):  # fmt: skip
    """Columns FROM … FROM + WIDTH of the rows of a head: [rows, WIDTH], zero beyond the limit and beyond D."""
    column = FROM + tl.arange(0, WIDTH)
    where = base + rows.to(tl.int64)[:, None] * row_stride + column[None, :] * width_stride
    if FROM + WIDTH <= D:
        x = tl.load(where, mask=rows[:, None] < limit, other=0.0)
    else:
        x = tl.load(where, mask=(rows[:, None] < limit) & (column[None, :] < D), other=0.0)
    if EXACT:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_rows(base, rows, limit, row_stride, width_stride, D: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
              EXACT: tl.constexpr):  # fmt: skip
    """The rows of a head in two parts, [rows, FIRST] and [rows, REST]; the first one twice where there is no rest."""
    part1 = load_part(base, rows, limit, row_stride, width_stride, D, 0, FIRST, EXACT)
    part2 = part1
    if REST > 0:
        part2 = load_part(base, rows, limit, row_stride, width_stride, D, FIRST, REST, EXACT)
    return part1, part2


@triton.jit
def scores_of(q1, q2, base, columns, limit, row_stride, width_stride, D: tl.constexpr, FIRST: tl.constexpr,
              REST: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """query·key of a tile: [queries, keys] float32. The width goes in two products, so 40 costs 48 and not 64."""
    k1 = load_part(base, columns, limit, row_stride, width_stride, D, 0, FIRST, EXACT)
    scores = tl.dot(q1, tl.trans(k1), input_precision="tf32x3")
    if REST > 0:
        k2 = load_part(base, columns, limit, row_stride, width_stride, D, FIRST, REST, EXACT)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="tf32x3")
    return scores
