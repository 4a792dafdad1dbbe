"""Self-attention collection (paper 3.1): one running map, mean over heads and blocks, on the finest grid."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels import head_mean_attention, lse_of, upsample_attention


class AttentionAverage:
    """Running mean over blocks of one forward pass; give `add` to a backbone as `on_attention`.

    Args:
        finest: the finest grid, which must be known beforehand so that one running map is all that is held.
        blocks: those to average; every one of them must be seen.
        rows: int64 [R], queries of the finest grid; None holds all N.
    """

    def __init__(self, finest: tuple[int, int], blocks: Collection[int], rows: Tensor | None = None) -> None:
        self._finest, self._blocks, self._rows = finest, blocks, rows
        self._map: Tensor | None = None
        self._seen = 0

    def add(self, attention: SelfAttention) -> None:
        """Take one block into the mean."""
        if attention.block not in self._blocks:
            return
        query, key, scale, lse = attention.query, attention.key, attention.scale, lse_of(attention)
        weight = 1 / len(self._blocks)
        if attention.grid != self._finest:
            coarse = head_mean_attention(query, key, scale=scale, lse=lse)
            self._map = upsample_attention(
                coarse, attention.grid, self._finest, self._map, rows=self._rows, weight=weight
            )
        else:
            if self._rows is not None:
                query, lse = query.index_select(2, self._rows), lse if lse is None else lse.index_select(2, self._rows)
            self._map = head_mean_attention(query, key, self._map, scale=scale, lse=lse, weight=weight)
        self._seen += 1

    def log2_mean(self) -> Tensor:
        """log₂ SA(X_t): [B, N, N] over the finest grid, or [B, R, N] of its sampled rows.

        Raises:
            ArgumentError: not every block was seen.
        """
        if self._map is None or self._seen != len(self._blocks):
            raise ArgumentError(
                f"{self._seen} of the self-attention blocks {sorted(self._blocks)} were seen; "
                "check the block numbers and the backbone's tap."
            )
        return self._map
