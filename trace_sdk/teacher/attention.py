"""Self-attention collection (paper 3.1): mean over heads, finest grid, mean over blocks.

Maps are kept as the log of the mean probability. Probabilities of peaky attention underflow, and a KL taken
from them is wrong by half (DESIGN section 6); logs are not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError


def log_mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """log of the mean over heads of softmax(QKᵀ·scale).

    Args:
        query, key: [B, heads, N, d], any float dtype; computed in float32, or float64 if given.

    Returns:
        [B, N, N], rows are log-distributions: exp sums to 1.
    """
    if query.dtype != torch.float64:
        query, key = query.float(), key.float()
    total: Tensor | None = None
    with torch.autocast(query.device.type, enabled=False):  # bf16 scores would ruin the KL of peaky rows
        for head in range(query.shape[1]):  # a head at a time: one N×N map more than the result
            scores = query[:, head] @ key[:, head].transpose(-1, -2) * scale
            log_probability = scores.log_softmax(dim=-1)
            total = log_probability if total is None else torch.logaddexp(total, log_probability)
    assert total is not None
    return total - math.log(query.shape[1])


def upsample_map(log_map: Tensor, grid: tuple[int, int], finest: tuple[int, int]) -> Tensor:
    """A map of a coarser grid on the finest one: bilinear on key and query axes, rows renormalised.

    Args:
        log_map: [B, n, n] over `grid`.

    Returns:
        [B, N, N] over `finest`.
    """
    if grid == finest:
        return log_map
    batch, coarse = log_map.shape[:2]
    fine = finest[0] * finest[1]
    keys = F.interpolate(log_map.exp().view(batch, coarse, *grid), finest, mode="bilinear")  # [B, n, H, W]
    queries = keys.flatten(2).transpose(1, 2).reshape(batch, fine, *grid)  # [B, N keys, h, w]
    both = F.interpolate(queries, finest, mode="bilinear").flatten(2).transpose(1, 2)  # [B, N queries, N keys]
    tiny = torch.finfo(both.dtype).tiny
    return (both / both.sum(-1, keepdim=True)).clamp_min(tiny).log()


class AttentionAverage:
    """Running mean over blocks of one forward pass; give `add` to a backbone as `on_attention`.

    The finest grid must be known beforehand, so that one running map is all that is held.
    """

    def __init__(self, finest: tuple[int, int], blocks: set[int] | None = None) -> None:
        self._finest, self._wanted = finest, blocks
        self._total: Tensor | None = None
        self._blocks = 0

    def add(self, attention: SelfAttention) -> None:
        """Take one block into the mean."""
        if self._wanted is not None and attention.block not in self._wanted:
            return
        log_map = log_mean_attention(attention.query, attention.key, attention.scale)
        log_map = upsample_map(log_map, attention.grid, self._finest)
        self._total = log_map if self._total is None else torch.logaddexp(self._total, log_map)
        self._blocks += 1

    def log_mean(self) -> Tensor:
        """log SA(X_t): [B, N, N] over the finest grid. Raises ArgumentError if no block was seen."""
        if self._total is None:
            raise ArgumentError("No self-attention block was seen; check the block numbers and the backbone's tap.")
        return self._total - math.log(self._blocks)
