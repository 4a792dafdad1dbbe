"""Attention Boundary Divergence (paper 3.3): how much attention differs between a token's opposite neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError

VERTICAL, HORIZONTAL, DIAGONAL, ANTIDIAGONAL = (1, 0), (0, 1), (1, 1), (1, -1)
NEIGHBOURHOODS = {4: (VERTICAL, HORIZONTAL), 8: (VERTICAL, HORIZONTAL, DIAGONAL, ANTIDIAGONAL)}


def row_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) in nats over the last axis of log-distributions; a row that is 0 in p adds 0. [..., N] → [...]."""
    difference = torch.where(log_p == -torch.inf, 0, log_p - log_q)
    return (log_p.exp() * difference).sum(-1)


def neighbour(x: Tensor, step: tuple[int, int]) -> Tensor:
    """x [..., H, W, C] moved so that position (i, j) holds x[i + step₀, j + step₁].

    A neighbour outside the grid is replaced by the last one inside: the pair is then one-sided.
    """
    height, width = x.shape[-3], x.shape[-2]
    rows = (torch.arange(height, device=x.device) + step[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + step[1]).clamp(0, width - 1)
    return x.index_select(-3, rows).index_select(-2, columns)


def opposite(x: Tensor, direction: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The neighbours ahead and behind along a direction: two of [..., H, W, C]."""
    return neighbour(x, direction), neighbour(x, (-direction[0], -direction[1]))


def abdiv(log_attention: Tensor, grid: tuple[int, int], neighbourhood: int = 4) -> Tensor:
    """ABDiv(i,j) = KL(SA[i+1,j] ‖ SA[i−1,j]) + KL(SA[i,j+1] ‖ SA[i,j−1]), in nats.

    Args:
        log_attention: [B, N, N], log of the head- and block-averaged map; rows sum to 1 after exp.
        grid: (H, W), H·W = N.
        neighbourhood: 4, or 8 to add the two diagonals.

    Returns:
        [B, H, W], ≥ 0 up to rounding. At the image border the pair is one-sided.
    """
    if neighbourhood not in NEIGHBOURHOODS:
        raise ArgumentError(f"neighbourhood must be 4 or 8, got {neighbourhood}.")
    rows = torch.unflatten(log_attention, 1, grid)  # [B, H, W, N]
    return sum(
        (row_kl(*opposite(rows, direction)) for direction in NEIGHBOURHOODS[neighbourhood]),
        start=rows.new_zeros(()),
    )


def per_head_divergence(attention: SelfAttention, *, symmetric: bool) -> Tensor:
    """Divergence between opposite neighbours of each head's own map, without any N×N map (DESIGN section 2).

    Per head KL(p‖q) = s·(Q_p − Q_q)·k̄_p − lse_p + lse_q with k̄ = softmax(QKᵀ·s)·K. The symmetric (Jeffreys) form
    KL(p‖q) + KL(q‖p) = s·(Q_p − Q_q)·(k̄_p − k̄_q) needs one ordinary attention call with V = K and no log-sum-exp.

    Returns:
        [B, 2·heads, H, W]: vertical then horizontal pairs, in nats.
    """
    query, key, scale = attention.query, attention.key, attention.scale
    mean_key = attention.mean_key
    if mean_key is None:
        mean_key = F.scaled_dot_product_attention(query, key, key, scale=scale)
    grid_query, grid_mean = (torch.unflatten(x, 2, attention.grid) for x in (query, mean_key))
    maps = []
    if not symmetric:
        scores = query @ key.transpose(-1, -2) * scale
        lse = torch.unflatten(scores.logsumexp(-1, keepdim=True), 2, attention.grid)
    for direction in NEIGHBOURHOODS[4]:
        query_p, query_q = opposite(grid_query, direction)
        mean_p, mean_q = opposite(grid_mean, direction)
        if symmetric:
            maps.append(((query_p - query_q) * (mean_p - mean_q)).sum(-1) * scale)
        else:
            lse_p, lse_q = opposite(lse, direction)
            maps.append(((query_p - query_q) * mean_p).sum(-1) * scale - (lse_p - lse_q).squeeze(-1))
    return torch.cat(maps, dim=1)


def abdiv_per_head(attention: SelfAttention) -> Tensor:
    """Mean over heads of each head's own ABDiv: [B, H, W].

    Not the paper's quantity but a cheap relative: never smaller than ABDiv of the averaged map (joint convexity
    of KL), about 2.9 times larger, Pearson 0.977 with it (DESIGN section 2).
    """
    heads = attention.query.shape[1]
    return per_head_divergence(attention, symmetric=False).sum(1) / heads


def log_divergence_features(attention: SelfAttention) -> Tensor:
    """log1p of each head's symmetric divergence: [B, 2·heads, H, W] ≥ 0, the student decoder's input."""
    # Rounding can bring a divergence a hair below 0.
    return per_head_divergence(attention, symmetric=True).float().clamp_min(0).log1p()
