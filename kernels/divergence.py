"""Attention Boundary Divergence (paper 3.3): how much attention differs between a token's opposite neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels.device import check_device, runs_triton
from trace_sdk.kernels.head_mean import LN2, full_precision, head_mean_attention, lse_of
from trace_sdk.kernels.temporal_kl import row_kl_reference
from trace_sdk.kernels.upsample import upsample_attention

VERTICAL, HORIZONTAL, DIAGONAL, ANTIDIAGONAL = (1, 0), (0, 1), (1, 1), (1, -1)
NEIGHBOURHOODS = {4: (VERTICAL, HORIZONTAL), 8: (VERTICAL, HORIZONTAL, DIAGONAL, ANTIDIAGONAL)}
CPU_PART = 1 << 18  # elements of an image row at a time on a CPU
STRIP = {"cuda": 1 << 22, "cpu": 1 << 19}  # elements of the map at a time: fills a GPU; stays in a core's cache


def neighbour(x: Tensor, step: tuple[int, int]) -> Tensor:
    """x [..., H, W, C] moved so that position (i, j) holds x[i + step₀, j + step₁], each step −1, 0 or 1.

    A neighbour outside the grid is replaced by the last one inside: the pair is then one-sided. Slices, since indices
    would be made anew for each picture.
    """
    for dimension, by in ((-3, step[0]), (-2, step[1])):
        rest = x.shape[dimension] - 1
        if by > 0:
            x = torch.cat([x.narrow(dimension, 1, rest), x.narrow(dimension, rest, 1)], dimension)
        elif by < 0:
            x = torch.cat([x.narrow(dimension, 0, 1), x.narrow(dimension, 0, rest)], dimension)
    return x


def opposite(x: Tensor, direction: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The neighbours ahead and behind along a direction: two of [..., H, W, C]."""
    return neighbour(x, direction), neighbour(x, (-direction[0], -direction[1]))


def abdiv_reference(log2_attention: Tensor, grid: tuple[int, int], neighbourhood: int = 4) -> Tensor:
    """The definition: ABDiv(i,j) = KL(SA[i+1,j] ‖ SA[i−1,j]) + KL(SA[i,j+1] ‖ SA[i,j−1]). [B, N, N] → [B, H, W]."""
    rows = torch.unflatten(log2_attention, 1, grid)
    pairs = [row_kl_reference(*opposite(rows, direction)) for direction in NEIGHBOURHOODS[neighbourhood]]
    return torch.stack(pairs).sum(0)


@torch.no_grad()
def abdiv(log2_attention: Tensor, grid: tuple[int, int], neighbourhood: int = 4) -> Tensor:
    """ABDiv of a whole map, in nats.

    Args:
        log2_attention: log₂ map [B, N, N]; rows sum to 1 after exp2.
        grid: (H, W), H·W = N.
        neighbourhood: 4, or 8 to add the two diagonals.

    Returns:
        [B, H, W] ≥ 0 up to rounding, float32 (float64 for a float64 map); at the image border the pair is
        one-sided. No gradient, and the same bits each time.

    Raises:
        ArgumentError: the map is not over this grid, or the neighbourhood is unknown.
        DeviceError, MissingExtraError: no kernel for the map's device.
    """
    if log2_attention.ndim != 3 or log2_attention.shape[1] != grid[0] * grid[1]:
        raise ArgumentError(f"A map over the grid {grid} has {grid[0] * grid[1]} rows: {tuple(log2_attention.shape)}.")
    _check_neighbourhood(neighbourhood)
    check_device(log2_attention)
    divergence: Tensor = _abdiv_strip_op(log2_attention, list(grid), 0, 0, grid[0], neighbourhood)
    return divergence


@torch.no_grad()
def abdiv_from_qk(
    attentions: Sequence[SelfAttention], grid: tuple[int, int] | None = None, neighbourhood: int = 4
) -> Tensor:
    """ABDiv of the mean over heads and blocks, a strip of image rows at a time: the N×N map never exists.

    Holds a strip and its two neighbouring image rows, and one small map for each block on a coarser grid.

    Args:
        attentions: one for each block of one forward pass.
        grid: the finest grid (H, W); None for that of the first block.
        neighbourhood: 4 or 8.

    Returns:
        [B, H, W] in nats, as `abdiv` of the averaged map.

    Raises:
        ArgumentError: no block was given, or a shape does not fit.
        DeviceError, MissingExtraError: no kernel for the tensors' device.
    """
    if not attentions:
        raise ArgumentError("No self-attention block was given; check the block numbers and the backbone's tap.")
    _check_neighbourhood(neighbourhood)
    height, width = grid = grid or attentions[0].grid
    query = attentions[0].query
    batch, tokens = query.shape[0], height * width
    lse = [lse_of(a) for a in attentions]
    # A coarse block's own map is small, and every fine row needs some rows of it.
    coarse = {
        index: head_mean_attention(a.query, a.key, scale=a.scale, lse=lse[index])
        for index, a in enumerate(attentions)
        if a.grid != grid
    }
    at_once = max(1, min(height, STRIP[query.device.type] // (batch * width * tokens)))
    dtype = torch.float16 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    strip = query.new_empty((batch, (at_once + 2) * width, tokens), dtype=dtype)

    def fill(into: Tensor, first: int, last: int) -> None:
        rows = slice(first * width, last * width)
        share = 1 / len(attentions)
        for index, (a, known) in enumerate(zip(attentions, lse, strict=True)):
            add = index > 0
            if index in coarse:
                wanted = torch.arange(rows.start, rows.stop, device=query.device)
                upsample_attention(coarse[index], a.grid, grid, into, add, rows=wanted, weight=share)
            else:
                known = None if known is None else known[:, :, rows]
                head_mean_attention(a.query[:, :, rows], a.key, into, add, scale=a.scale, lse=known, weight=share)

    answer = []
    held_first = held_last = 0  # image rows that the strip holds
    for first in range(0, height, at_once):
        last = min(first + at_once, height)
        wanted_first, wanted_last = max(first - 1, 0), min(last + 1, height)
        kept = (held_last - wanted_first) * width
        strip[:, :kept] = strip[:, (wanted_first - held_first) * width : (held_last - held_first) * width].clone()
        if wanted_last > held_last:
            fill(strip[:, kept : (wanted_last - wanted_first) * width], held_last, wanted_last)
        held_first, held_last = wanted_first, wanted_last
        answer.append(_abdiv_strip_op(strip, list(grid), held_first, first, last, neighbourhood))
    return torch.cat(answer, 1)


def _check_neighbourhood(neighbourhood: int) -> None:
    if neighbourhood not in NEIGHBOURHOODS:
        raise ArgumentError(f"neighbourhood must be 4 or 8, got {neighbourhood}.")


@torch.library.custom_op("trace_sdk::abdiv_strip", mutates_args=())
def _abdiv_strip_op(
    strip: Tensor, grid: list[int], held_first: int, first: int, last: int, neighbourhood: int
) -> Tensor:
    """ABDiv of image rows first … last: [B, last − first, W], from a strip whose first image row is `held_first`."""
    if runs_triton(strip):
        from trace_sdk.kernels.divergence_triton import launch_abdiv

        return launch_abdiv(strip, (grid[0], grid[1]), held_first, first, last, neighbourhood)

    height, width = grid
    result = strip.new_empty((strip.shape[0], last - first, width), dtype=full_precision(strip[:0]).dtype)

    def image_row(batch: int, row: int, keys: slice) -> Tensor:
        start = (min(max(row, 0), height - 1) - held_first) * width
        return full_precision(strip[batch, start : start + width, keys])  # [W, keys]

    def columns(x: Tensor, step: int) -> Tensor:
        return neighbour(x[None], (0, step))[0]

    tokens, at_once = strip.shape[2], max(1, CPU_PART // width)
    result.zero_()
    for batch, row, first_key in product(range(strip.shape[0]), range(first, last), range(0, tokens, at_once)):
        keys = slice(first_key, first_key + at_once)
        rows = {step: image_row(batch, row + step, keys) for step in (-1, 0, 1)}
        probability = {step: rows[step].exp2() for step in (0, 1)}
        for down, right in NEIGHBOURHOODS[neighbourhood]:
            difference = columns(rows[down], right) - columns(rows[-down], -right)
            result[batch, row - first] += torch.linalg.vecdot(columns(probability[down], right), difference)
    return result.mul_(LN2)


@_abdiv_strip_op.register_fake
def _(strip: Tensor, grid: list[int], held_first: int, first: int, last: int, neighbourhood: int) -> Tensor:
    return strip.new_empty((strip.shape[0], last - first, grid[1]), dtype=full_precision(strip[:0]).dtype)
