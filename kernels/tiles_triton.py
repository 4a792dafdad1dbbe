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
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: queries and keys a program, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def split_width(x: Tensor) -> tuple[int, int]:
    """A head's width as a power of two and the rest, each at least 16: 40 → 32 + 16, 72 → 64 + 16, 128 → 128 + 0.

    Of exact products it is one power of two: in two parts, Triton 3.6 read out of bounds at 72 on an H100.
    """
    width = x.shape[-1]
    if exact_dots(x):
        return max(16, 1 << (width - 1).bit_length()), 0
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
    width = sum(split_width(query)) * query.element_size()
    while (tile.queries + 2 * tile.stages * tile.keys) * width > limit and tile.keys > 16:
        tile = Tile(max(16, tile.queries // 2), tile.keys // 2, tile.warps, tile.stages)
    return tile


def exact_dots(x: Tensor) -> bool:
    """Whether products are taken in float32: for float32 itself, and for bfloat16, which the interpreter cannot."""
    return x.dtype == torch.float32 or (INTERPRETED and x.dtype == torch.bfloat16)


def aligned(x: Tensor) -> Tensor:
    """x [B, heads, N, d] itself if the GPU's copy engine can read its rows where they lie, else a copy that it can.

    That wants rows without gaps inside, and each at a multiple of 16 bytes of its own. Zeros fill the width up to one.
    """
    bytes_each = x.element_size()
    steps = [stride * bytes_each for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step and step % 16 == 0 for step in steps):
        return x
    short = -x.shape[-1] % (16 // bytes_each)
    return torch.nn.functional.pad(x, (0, short)).contiguous()


def tiles_of(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of tiles of x [B, heads, N, d]: [rows, first] and [rows, rest] of `split_width`, None without a rest.

    Beyond the last row and the width they read zeros.
    """
    first, rest = split_width(x)
    x = aligned(x)
    # A dimension of one has any stride; the copy engine wants a multiple of 16 bytes.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)] + [1]
    part1 = TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, first])
    if not rest:
        return part1, None
    beyond = x[..., first:]
    return part1, TensorDescriptor(beyond, list(beyond.shape), strides, [1, 1, rows, rest])


@triton.jit
def load_tile(part1, part2, batch, head, row, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
              EXACT: tl.constexpr):  # fmt: skip
    """Rows of a head from `row` on in two parts, [ROWS, FIRST] and [ROWS, REST]; the first one twice without a rest."""
    x1 = part1.load([batch, head, row, 0]).reshape(ROWS, FIRST)
    if EXACT:
        x1 = x1.to(tl.float32)
    x2 = x1
    if REST > 0:
        x2 = part2.load([batch, head, row, 0]).reshape(ROWS, REST)
        if EXACT:
            x2 = x2.to(tl.float32)
    return x1, x2


@triton.jit
def scores_of(q1, q2, k1, k2, REST: tl.constexpr):
    """query·key of a tile: [queries, keys] float32. The width goes in two products, so 40 costs 48 and not 64."""
    scores = tl.dot(q1, k1.T, input_precision="tf32x3")
    if REST > 0:
        scores = tl.dot(q2, k2.T, scores, input_precision="tf32x3")
    return scores
