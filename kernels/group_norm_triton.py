"""Triton kernels behind `group_norm`: moments of parts of a group, then all of it normalised."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # values at a time
PARTS = 64  # of a group, at most: each program of the second kernel reads the moments of all


def launch_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """See `group_norm.group_norm`; `x` is contiguous."""
    batch, channels = x.shape[:2]
    plane = x[0, 0].numel()
    values = channels // groups * plane  # of a group, which lie side by side
    blocks = triton.cdiv(values, BLOCK)
    each = triton.cdiv(blocks, PARTS)  # blocks of a part
    parts = triton.cdiv(blocks, each)
    moments = x.new_empty((batch * groups, parts, 2), dtype=torch.float32)
    _moments[(batch * groups, parts)](x, moments, values, each, BLOCK, num_warps=8)
    answer = torch.empty_like(x)
    block = min(BLOCK, max(64, triton.next_power_of_2(plane)))
    _normalise[(batch * channels, triton.cdiv(plane, block))](
        x, moments, weight, bias, answer, channels, channels // groups, plane, values, parts, each * BLOCK, eps,
        silu, triton.next_power_of_2(parts), block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return answer


@triton.jit
def _moments(x, moments, values, each, BLOCK: tl.constexpr):
    """Mean and sum of squared differences from it, of a part of a group; blocks merged as they come."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, squares, count = 0.0, 0.0, 0.0
    for number in range(0, each):
        place = (part * each + number) * BLOCK + tl.arange(0, BLOCK)
        inside = place < values
        block = tl.load(x + group * values + place, mask=inside, other=0.0).to(tl.float32)
        block_count = tl.maximum(tl.sum(inside.to(tl.float32), 0), 1e-20)
        block_mean = tl.sum(block, 0) / block_count
        apart = tl.where(inside, block - block_mean, 0.0)
        step, both = block_mean - mean, count + block_count
        squares += tl.sum(apart * apart, 0) + step * step * count * block_count / both
        mean += step * block_count / both
        count = both
    where = moments + (group * tl.num_programs(1) + part) * 2
    tl.store(where, mean)
    tl.store(where + 1, squares)


@triton.jit
def _normalise(x, moments, weight, bias, answer, channels, group_channels, plane, values, parts, part_values, eps,
               SILU: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)  # picture and channel
    group, channel = row // group_channels, row % channels
    part = tl.arange(0, PARTS)
    known = part < parts
    where = moments + (group * parts + part) * 2
    means, squares = tl.load(where, mask=known, other=0.0), tl.load(where + 1, mask=known, other=0.0)
    counts = tl.where(known, tl.minimum(part_values, values - part * part_values), 0).to(tl.float32)
    mean = tl.sum(means * counts, 0) / values
    apart = means - mean
    scale = tl.rsqrt(tl.sum(squares + counts * apart * apart, 0) / values + eps)
    if weight is not None:
        scale *= tl.load(weight + channel).to(tl.float32)
    shift = -mean * scale
    if bias is not None:
        shift += tl.load(bias + channel).to(tl.float32)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < plane
    start = row.to(tl.int64) * plane
    y = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32) * scale + shift
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(answer + start + place, y, mask=inside)
