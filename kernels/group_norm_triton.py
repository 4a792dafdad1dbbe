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
    """See `group_norm.group_norm`; `x` [B, C, N] has any strides, and the answer has them, too."""
    batch, channels, positions = x.shape
    group_channels = channels // groups
    across = triton.next_power_of_2(group_channels)
    at_once = max(BLOCK // across, 16)
    blocks = triton.cdiv(positions, at_once)
    each = triton.cdiv(blocks, PARTS)  # blocks of a part
    parts = triton.cdiv(blocks, each)
    moments = x.new_empty((batch * groups, parts, 2), dtype=torch.float32)
    _moments[(batch * groups, parts)](
        x, moments, *x.stride(), groups, group_channels, positions, each, across, at_once, num_warps=8
    )
    answer = torch.empty_like(x)
    _normalise[(batch * groups, blocks)](
        x, moments, weight, bias, answer, *x.stride(), *answer.stride(), groups, group_channels, positions,
        parts, each * at_once, eps, silu, triton.next_power_of_2(parts), across, at_once, num_warps=8,
    )  # fmt: skip
    return answer


@triton.jit
def _moments(x, moments, x_batch, x_channel, x_position, groups, group_channels, positions, each,
             ACROSS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Mean and sum of squared differences from it, of a part of a group; blocks merged as they come."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, ACROSS)
    base = x + pair // groups * x_batch + (pair % groups * group_channels + channel)[:, None] * x_channel
    mean, squares, count = 0.0, 0.0, 0.0
    for number in range(0, each):
        position = (part * each + number) * AT_ONCE + tl.arange(0, AT_ONCE)
        inside = (channel[:, None] < group_channels) & (position[None, :] < positions)
        block = tl.load(base + position.to(tl.int64)[None, :] * x_position, mask=inside, other=0.0).to(tl.float32)
        block_count = tl.maximum(tl.sum(tl.sum(inside.to(tl.float32), 1), 0), 1e-20)
        block_mean = tl.sum(tl.sum(block, 1), 0) / block_count
        apart = tl.where(inside, block - block_mean, 0.0)
        step, both = block_mean - mean, count + block_count
        squares += tl.sum(tl.sum(apart * apart, 1), 0) + step * step * count * block_count / both
        mean += step * block_count / both
        count = both
    where = moments + (pair * tl.num_programs(1) + part) * 2
    tl.store(where, mean)
    tl.store(where + 1, squares)


@triton.jit
def _normalise(x, moments, weight, bias, answer, x_batch, x_channel, x_position, a_batch, a_channel, a_position,
               groups, group_channels, positions, parts, part_positions, eps, SILU: tl.constexpr,
               PARTS: tl.constexpr, ACROSS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    known = part < parts
    where = moments + (pair * parts + part) * 2
    means, squares = tl.load(where, mask=known, other=0.0), tl.load(where + 1, mask=known, other=0.0)
    counts = tl.where(known, tl.minimum(part_positions, positions - part * part_positions), 0).to(tl.float32)
    mean = tl.sum(means * counts, 0) / positions
    apart = means - mean
    values = positions * group_channels
    variance = (tl.sum(squares, 0) + tl.sum(counts * apart * apart, 0) * group_channels) / values
    scale = tl.full([ACROSS], 1.0, tl.float32) * tl.rsqrt(variance + eps)
    in_group = tl.arange(0, ACROSS)
    channel = pair % groups * group_channels + in_group
    if weight is not None:
        scale *= tl.load(weight + channel, mask=in_group < group_channels, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=in_group < group_channels, other=0.0).to(tl.float32)
    position = (tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)).to(tl.int64)
    inside = (in_group[:, None] < group_channels) & (position[None, :] < positions)
    from_x = x + pair // groups * x_batch + channel[:, None] * x_channel + position[None, :] * x_position
    y = tl.load(from_x, mask=inside, other=0.0).to(tl.float32) * scale[:, None] + shift[:, None]
    if SILU:
        y = y / (1 + tl.exp(-y))
    to = answer + pair // groups * a_batch + channel[:, None] * a_channel + position[None, :] * a_position
    tl.store(to, y, mask=inside)
