"""Triton kernel behind `temporal_kl`: one row a program, both maps read once."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_sdk.kernels.head_mean import LN2

_LN2 = tl.constexpr(LN2)


def launch_row_kl(previous: Tensor, current: Tensor, keys: int = 1024) -> Tensor:
    """See `temporal_kl.temporal_kl`; here [B, R] before the mean over rows. `keys` are read at a time."""
    batch, rows, tokens = previous.shape
    kl = previous.new_empty((batch, rows), dtype=torch.float32)
    _row_kl[(rows, batch)](
        previous, current, kl, *previous.stride(), *current.stride(), rows, tokens, keys, num_warps=4
    )
    return kl


@triton.jit
def _row_kl(previous, current, kl, p_batch, p_row, p_key, c_batch, c_row, c_key, rows, tokens, KEYS: tl.constexpr):
    batch, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        p = tl.load(previous + batch * p_batch + row * p_row + key * p_key, mask=key < tokens, other=0.0).to(tl.float32)
        q = tl.load(current + batch * c_batch + row * c_row + key * c_key, mask=key < tokens, other=0.0).to(tl.float32)
        total += tl.where(key < tokens, tl.exp2(p) * (p - q), 0.0)
    tl.store(kl + batch * rows + row, tl.sum(total, 0) * _LN2)
