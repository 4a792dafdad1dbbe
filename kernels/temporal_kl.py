"""KL between the maps of two timesteps (paper 3.2), row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from trace_sdk.errors import ArgumentError
from trace_sdk.kernels.device import check_device, runs_triton
from trace_sdk.kernels.head_mean import LN2, full_precision, row_blocks


def row_kl_reference(log2_p: Tensor, log2_q: Tensor) -> Tensor:
    """KL(p‖q) in nats over the last axis of log₂ distributions; what is 0 in p adds 0. [..., N] → [...]."""
    difference = torch.where(log2_p == -torch.inf, 0, log2_p - log2_q)
    return (log2_p.exp2() * difference).sum(-1) * LN2


@torch.no_grad()
def temporal_kl(previous: Tensor, current: Tensor) -> Tensor:
    """KL(SA(X_t_prev) ‖ SA(X_t)) in nats, mean over rows.

    Args:
        previous, current: log₂ maps [B, R, N], of all rows or of the same sample of them, and of one dtype.

    Returns:
        [B], float32 (float64 for float64 maps); no gradient, and the same bits each time.

    Raises:
        ArgumentError: the maps differ in shape, dtype or device.
        DeviceError, MissingExtraError: no kernel for their device.
    """
    if previous.shape != current.shape or previous.ndim != 3 or previous.dtype != current.dtype:
        raise ArgumentError(
            f"Both maps must be [B, R, N] of one dtype, got {tuple(previous.shape)} {previous.dtype} "
            f"and {tuple(current.shape)} {current.dtype}."
        )
    check_device(previous)
    kl: Tensor = _row_kl_op(previous, current)
    return kl.mean(-1)


@torch.library.custom_op("trace_sdk::row_kl", mutates_args=())
def _row_kl_op(previous: Tensor, current: Tensor) -> Tensor:
    if runs_triton(previous):
        from trace_sdk.kernels.temporal_kl_triton import launch_row_kl

        return launch_row_kl(previous, current)

    kl = torch.empty_like(full_precision(previous[..., 0]))
    for batch in range(previous.shape[0]):
        for rows in row_blocks(previous.shape[1], previous.shape[2]):
            log2_p, log2_q = full_precision(previous[batch, rows]), full_precision(current[batch, rows])
            kl[batch, rows] = row_kl_reference(log2_p, log2_q)
    return kl


@_row_kl_op.register_fake
def _(previous: Tensor, current: Tensor) -> Tensor:
    return torch.empty_like(full_precision(previous[..., 0]))
