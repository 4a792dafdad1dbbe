"""How much attention changes from one timestep to the next: the paper's KL (3.2), and its table 4's others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trace_sdk.kernels import temporal_kl
from trace_sdk.kernels.head_mean import full_precision, row_blocks

Criterion = Callable[[Tensor, Tensor, "tuple[int, int]"], Tensor]
"""(previous, current, grid) → mean over rows [B], ≥ 0; maps are log₂ of rows [B, R, H·W] over keys on the grid."""


def kl(previous: Tensor, current: Tensor, grid: tuple[int, int]) -> Tensor:
    """KL(previous ‖ current) in nats."""
    return temporal_kl(previous, current)


def l2(previous: Tensor, current: Tensor, grid: tuple[int, int]) -> Tensor:
    """‖p − q‖₂ of a row."""
    return _mean_over_rows(lambda p, q: (p - q).square().sum(-1).sqrt(), previous, current)


def entropy(previous: Tensor, current: Tensor, grid: tuple[int, int]) -> Tensor:
    """|H(p) − H(q)| of a row, in nats."""
    return _mean_over_rows(
        lambda p, q: (torch.special.entr(p) - torch.special.entr(q)).sum(-1).abs(), previous, current
    )


def wasserstein(previous: Tensor, current: Tensor, grid: tuple[int, int]) -> Tensor:
    """W₁ of a row's two marginals on the grid, along its height and its width, added; in tokens.

    A lower bound of the W₁ over the grid itself with city-block distances, which has no closed form.
    """

    def distance(p: Tensor, q: Tensor) -> Tensor:
        difference = (p - q).unflatten(-1, grid)  # type: ignore[no-untyped-call]
        along = (difference.sum(axis).cumsum(-1).abs().sum(-1) for axis in (-1, -2))
        return sum(along, torch.zeros_like(p[..., 0]))

    return _mean_over_rows(distance, previous, current)


CRITERIA: dict[str, Criterion] = {"kl": kl, "l2": l2, "entropy": entropy, "wasserstein": wasserstein}


def _mean_over_rows(of_rows: Callable[[Tensor, Tensor], Tensor], previous: Tensor, current: Tensor) -> Tensor:
    """A few rows at a time, as probabilities in fp32."""
    means = []
    for p, q in zip(previous, current, strict=True):
        parts = [
            of_rows(full_precision(p[rows]).exp2(), full_precision(q[rows]).exp2()) for rows in row_blocks(*p.shape)
        ]
        means.append(torch.cat(parts).mean())
    return torch.stack(means)
