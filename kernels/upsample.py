"""A map of a coarser grid on a finer one (paper 3.1): bilinear on key and query axes, rows renormalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.errors import ArgumentError
from trace_sdk.kernels.device import check_device, runs_triton
from trace_sdk.kernels.head_mean import FLOOR, HEADROOM, full_precision, row_blocks

Grid = tuple[int, int]


def upsample_attention_reference(coarse: Tensor, grid: Grid, finest: Grid) -> Tensor:
    """The definition: log₂ map [B, n, n] over `grid` → [B, N, N] over `finest`."""
    probability = full_precision(coarse).exp2()
    keys = F.interpolate(torch.unflatten(probability, 2, grid), finest, mode="bilinear")  # [B, n, H, W]
    queries = torch.unflatten(keys.flatten(2).mT, 2, grid)  # [B, N keys, h, w]
    both = F.interpolate(queries, finest, mode="bilinear").flatten(2).mT  # [B, N queries, N keys]
    return (both / both.sum(-1, keepdim=True)).log2()


@torch.no_grad()
def upsample_attention(
    coarse: Tensor,
    grid: Grid,
    finest: Grid,
    out: Tensor | None = None,
    accumulate: bool = True,
    *,
    rows: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Rows of a coarse map as they are on the finest grid.

    Args:
        coarse: log₂ map [B, n, n] over `grid`.
        grid, finest: (h, w) with h·w = n, and (H, W) with H·W = N.
        out, accumulate, weight: as in `head_mean_attention`; `out` is [B, R, N].
        rows: int64 [R], the queries of the finest grid that are wanted; None for all N.

    Returns:
        `out`: log₂ map [B, R, N].

    Raises:
        ArgumentError: a shape does not fit.
        DeviceError, MissingExtraError: no kernel for the tensor's device.
    """
    n, finest_tokens = grid[0] * grid[1], finest[0] * finest[1]
    if coarse.ndim != 3 or coarse.shape[1:] != (n, n):
        raise ArgumentError(f"A map over the grid {grid} is [B, {n}, {n}], got {tuple(coarse.shape)}.")
    check_device(coarse)
    rows = torch.arange(finest_tokens, device=coarse.device) if rows is None else rows
    shape = (coarse.shape[0], rows.shape[0], finest_tokens)
    if out is None:
        out, accumulate = coarse.new_empty(shape), False
    elif out.shape != shape:
        raise ArgumentError(f"out must be {shape}, got {tuple(out.shape)}.")
    _upsample_op(coarse, list(grid), list(finest), rows, weight, accumulate, out)
    return out


def source_positions(fine: Tensor, coarse_size: int, fine_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear sampling of one axis: the two coarse positions each fine one lies between, and the second's share."""
    where = ((fine.float() + 0.5) * (coarse_size / fine_size) - 0.5).clamp_min(0)
    low = where.long().clamp_max(coarse_size - 1)
    return low, (low + 1).clamp_max(coarse_size - 1), where - low


@torch.library.custom_op("trace_sdk::upsample_attention", mutates_args=("out",))
def _upsample_op(
    coarse: Tensor, grid: list[int], finest: list[int], rows: Tensor, weight: float, accumulate: bool, out: Tensor
) -> None:
    if runs_triton(coarse):
        from trace_sdk.kernels.upsample_triton import launch_upsample

        launch_upsample(coarse, (grid[0], grid[1]), (finest[0], finest[1]), rows, weight, accumulate, out)
        return

    down, down_next, down_share = source_positions(rows // finest[1], grid[0], finest[0])
    right, right_next, right_share = source_positions(rows % finest[1], grid[1], finest[1])
    with torch.autocast("cpu", enabled=False):
        for batch in range(coarse.shape[0]):
            probability = (full_precision(coarse[batch]) + HEADROOM).exp2_()
            for part in row_blocks(rows.shape[0], out.shape[2]):
                y, x = down_share[part, None].to(probability.dtype), right_share[part, None].to(probability.dtype)
                top, bottom = down[part] * grid[1], down_next[part] * grid[1]
                queries = (1 - y) * ((1 - x) * probability[top + right[part]] + x * probability[top + right_next[part]])
                queries += y * (
                    (1 - x) * probability[bottom + right[part]] + x * probability[bottom + right_next[part]]
                )
                keys = F.interpolate(queries.view(-1, 1, *grid), (finest[0], finest[1]), mode="bilinear").flatten(1)
                # Summed without the headroom, which a sum over many keys would use up.
                keys *= weight / (keys * 2.0**-HEADROOM).sum(-1, keepdim=True)
                if accumulate:
                    keys += (full_precision(out[batch, part]) + HEADROOM).exp2_()
                out[batch, part] = keys.log2_().sub_(HEADROOM).clamp_min_(FLOOR)


@_upsample_op.register_fake
def _(
    coarse: Tensor, grid: list[int], finest: list[int], rows: Tensor, weight: float, accumulate: bool, out: Tensor
) -> None:
    pass
