"""Divergence of each head's own map between opposite neighbours: no map at all (DESIGN section 2).

Per head KL(p‖q) = s·(Q_p − Q_q)·k̄_p − lse_p + lse_q with k̄ = softmax(QKᵀ·s)·K, so one attention call with V = K does.
The symmetric (Jeffreys) form KL(p‖q) + KL(q‖p) = s·(Q_p − Q_q)·(k̄_p − k̄_q) needs no log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention, leaves_lse
from trace_sdk.kernels.device import runs_triton
from trace_sdk.kernels.divergence import NEIGHBOURHOODS, opposite
from trace_sdk.kernels.head_mean import check_query_key, log_sum_exp


def per_head_divergence_reference(attention: SelfAttention, *, symmetric: bool) -> Tensor:
    """The same in plain torch, for any device: differentiable and exportable, which the student needs."""
    query, key, scale, mean_key = attention.query, attention.key, attention.scale, attention.mean_key
    if mean_key is None:
        mean_key = F.scaled_dot_product_attention(query, key, key, scale=scale)
    lse = None
    if not symmetric:
        lse = (query @ key.mT * scale).logsumexp(-1)
    return _between_neighbours(query, mean_key, lse, attention.grid, scale)


@torch.no_grad()
def per_head_divergence(attention: SelfAttention, *, symmetric: bool) -> Tensor:
    """Divergence between opposite neighbours, by head; no gradient, and the same bits each time.

    Args:
        attention: query and key of one block.
        symmetric: KL both ways instead of ahead against behind.

    Returns:
        [B, 2·heads, H, W], float32 (on a CPU of the query's dtype): vertical then horizontal pairs, in nats.
        At the image border the pair is one-sided.

    Raises:
        ArgumentError: a shape or dtype does not fit.
        DeviceError, MissingExtraError: no kernel for the tensors' device.
    """
    query, key = attention.query, attention.key
    check_query_key(query, key)
    divergence: Tensor = _per_head_op(query, key, list(attention.grid), attention.scale, symmetric)
    return divergence


def _between_neighbours(
    query: Tensor, mean_key: Tensor, lse: Tensor | None, grid: tuple[int, int], scale: float
) -> Tensor:
    grid_query, grid_mean = (torch.unflatten(x, 2, grid) for x in (query, mean_key))
    maps = []
    for direction in NEIGHBOURHOODS[4]:
        query_p, query_q = opposite(grid_query, direction)
        mean_p, mean_q = opposite(grid_mean, direction)
        if lse is None:
            maps.append(((query_p - query_q) * (mean_p - mean_q)).sum(-1) * scale)
        else:
            lse_p, lse_q = opposite(torch.unflatten(lse[..., None], 2, grid), direction)
            maps.append(((query_p - query_q) * mean_p).sum(-1) * scale - (lse_p - lse_q).squeeze(-1))
    return torch.cat(maps, dim=1)


@torch.library.custom_op("trace_sdk::per_head_divergence", mutates_args=())
def _per_head_op(query: Tensor, key: Tensor, grid: list[int], scale: float, symmetric: bool) -> Tensor:
    if runs_triton(query):
        from trace_sdk.kernels.per_head_triton import launch_head_divergence, launch_mean_key

        mean_key, row_lse = launch_mean_key(query, key, scale)
        return launch_head_divergence(query, mean_key, row_lse, (grid[0], grid[1]), scale, symmetric)

    lse: Tensor | None
    attend = None if symmetric else leaves_lse(query, key, key)
    if attend is not None:
        mean_key, lse = attend(query, key, key, scale)
    else:
        mean_key = F.scaled_dot_product_attention(query, key, key, scale=scale)
        lse = None if symmetric else log_sum_exp(query, key, scale=scale)
    return _between_neighbours(query, mean_key, lse, (grid[0], grid[1]), scale)


@_per_head_op.register_fake
def _(query: Tensor, key: Tensor, grid: list[int], scale: float, symmetric: bool) -> Tensor:
    dtype = torch.float32 if runs_triton(query) else query.dtype
    return query.new_empty((query.shape[0], 2 * query.shape[1], grid[0], grid[1]), dtype=dtype)
