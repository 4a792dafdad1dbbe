"""Kernels: attention maps, their divergence between neighbours and between timesteps; a student's normalisation.

Each public function picks by device: Triton on CUDA, a few rows at a time in torch on a CPU. Its definition, of a few
lines of torch, stands beside it as `…_reference`. None of them carries a gradient. See docs/kernels.md.
"""

from trace_sdk.kernels.divergence import abdiv, abdiv_from_qk, abdiv_reference
from trace_sdk.kernels.group_norm import group_norm, group_norm_reference
from trace_sdk.kernels.head_mean import (
    head_mean_attention,
    head_mean_attention_reference,
    image_log_sum_exp,
    log_sum_exp,
    lse_of,
)
from trace_sdk.kernels.per_head import per_head_divergence, per_head_divergence_reference
from trace_sdk.kernels.temporal_kl import row_kl_reference, temporal_kl
from trace_sdk.kernels.upsample import upsample_attention, upsample_attention_reference

__all__ = [
    "abdiv",
    "abdiv_from_qk",
    "abdiv_reference",
    "group_norm",
    "group_norm_reference",
    "head_mean_attention",
    "head_mean_attention_reference",
    "image_log_sum_exp",
    "log_sum_exp",
    "lse_of",
    "per_head_divergence",
    "per_head_divergence_reference",
    "row_kl_reference",
    "temporal_kl",
    "upsample_attention",
    "upsample_attention_reference",
]
