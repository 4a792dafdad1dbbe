"""Head-averaged self-attention (paper 3.1): log₂ of the mean over heads of softmax(QKᵀ·s), from Q and K alone.

Maps are kept as log₂ of the mean probability. Probabilities of peaky attention underflow in half precision, and a KL
taken from them is wrong by half (DESIGN section 6); logs are not. Exponents carry `HEADROOM` on their way through
float32, so that a probability of 2⁻²²⁶ is still told from zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels.device import check_device, runs_triton

HEADROOM = 100.0
FLOOR = -226.0  # log₂ of the smallest float32 that is not denormal, less the headroom
LOG2E = math.log2(math.e)
LN2 = math.log(2)
CPU_BLOCK = 1 << 20  # scores held at a time on a CPU: 4 MiB, about a core's share of its last cache


def head_mean_attention_reference(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The definition, one map a head: [B, heads, N, d] and [B, heads, M, d] → log₂ of the mean map [B, N, M]."""
    log_probability = (query @ key.mT * scale).log_softmax(-1)
    return (log_probability.logsumexp(1) - math.log(query.shape[1])) / LN2


@torch.no_grad()
def head_mean_attention(
    query: Tensor,
    key: Tensor,
    out: Tensor | None = None,
    accumulate: bool = True,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """log₂ of the mean over heads of softmax(QKᵀ·scale); no map of a single head is ever held.

    Any strides are read in place: a slice of rows, or of the image tokens of a joint attention, costs no copy. The
    answer is the same bits each time, and carries no gradient.

    Args:
        query: [B, heads, N, d], float16, bfloat16 or float32 (float64 on a CPU), d from 16 to 256.
        key: [B, heads, M, d], as `query`. Rows are distributions over these M keys.
        out: a map [B, N, M] to write into; None makes one, float16 for half-precision queries, else of their dtype.
        accumulate: add to what `out` holds, as probabilities; False writes over it.
        scale: factor on query·key; None for 1/√d.
        lse: natural log-sum-exp of each query's scores over these keys, float32 [B, heads, N], where an attention
            call has left one: saves a pass over the keys. See `log_sum_exp`.
        weight: of this map in the sum, for a mean over blocks.

    Returns:
        `out`: log₂ of weight · mean probability (added to what was there), not below −226.

    Raises:
        ArgumentError: a shape or dtype does not fit.
        DeviceError, MissingExtraError: no kernel for the tensors' device.
    """
    check_query_key(query, key)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    if lse is not None and lse.shape != query.shape[:3]:
        raise ArgumentError(f"lse must be [B, heads, N] = {tuple(query.shape[:3])}, got {tuple(lse.shape)}.")
    if out is None:
        dtype = torch.float16 if query.dtype == torch.bfloat16 else query.dtype
        out, accumulate = query.new_empty(shape, dtype=dtype), False
    elif out.shape != shape or out.device != query.device or not out.is_floating_point():
        raise ArgumentError(f"out must be a float map {shape} on {query.device}, got {tuple(out.shape)}, {out.dtype}.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _head_mean_op(query, key, lse, scale, weight, accumulate, out)
    return out


@torch.no_grad()
def log_sum_exp(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """Natural log-sum-exp of each query's scores: [B, heads, N, d] and [B, heads, M, d] → float32 [B, heads, N].

    float64 of float64 ones.
    """
    check_query_key(query, key)
    lse: Tensor = _log_sum_exp_op(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    return lse


@torch.no_grad()
def image_log_sum_exp(lse: Tensor, query: Tensor, image_key: Tensor, text_key: Tensor, *, scale: float) -> Tensor:
    """Log-sum-exp over the image keys of a joint attention whose call left one over image and text keys.

    lse_image = lse + log(1 − exp(lse_text − lse)), which costs a pass over the few text keys. Where text holds more
    than 99 % of a query's mass that difference loses its digits, and the image keys are summed directly.

    Args:
        lse: float32 [B, heads, N], over both.
        query: [B, heads, N, d], the image's queries.
        image_key, text_key: [B, heads, M, d] and [B, heads, T, d].

    Returns:
        float32 [B, heads, N].
    """
    check_query_key(query, image_key)
    check_query_key(query, text_key)
    image_lse: Tensor = _image_log_sum_exp_op(lse, query, image_key, text_key, scale)
    return image_lse


def lse_of(attention: SelfAttention) -> Tensor | None:
    """Log-sum-exp over the image keys from the model's own attention call, None where it left none."""
    a = attention
    if a.joint_lse is None or a.text_key is None:
        return None
    if a.text_key.shape[2] == 0:
        return a.joint_lse
    return image_log_sum_exp(a.joint_lse, a.query, a.key, a.text_key, scale=a.scale)


def check_query_key(query: Tensor, key: Tensor) -> None:
    """Raise an error unless a kernel can read these."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ArgumentError(
            "query and key must be [B, heads, N, d] and [B, heads, M, d], "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if not 16 <= query.shape[3] <= 256:
        raise ArgumentError(f"The head width must be from 16 to 256, got {query.shape[3]}.")
    known = (torch.float16, torch.bfloat16, torch.float32, *((torch.float64,) if query.device.type == "cpu" else ()))
    if query.dtype != key.dtype or query.dtype not in known:
        raise ArgumentError(
            f"query and key must share one dtype of {', '.join(map(str, known))}; got {query.dtype} and {key.dtype}."
        )
    check_device(query)


def full_precision(x: Tensor) -> Tensor:
    """x in the dtype that CPU paths compute in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def row_blocks(rows: int, elements_a_row: int) -> Iterator[slice]:
    """Slices of rows that hold about `CPU_BLOCK` elements together, 16 rows at least."""
    step = max(16, CPU_BLOCK // max(elements_a_row, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


@torch.library.custom_op("trace_sdk::head_mean_attention", mutates_args=("out",))
def _head_mean_op(
    query: Tensor, key: Tensor, lse: Tensor | None, scale: float, weight: float, accumulate: bool, out: Tensor
) -> None:
    if runs_triton(query):
        from trace_sdk.kernels.head_mean_triton import launch_head_mean, launch_log_sum_exp

        lse = launch_log_sum_exp(query, key, scale) if lse is None else lse
        launch_head_mean(query, key, lse, scale, weight, accumulate, out)
        return

    heads = query.shape[1]
    with torch.autocast("cpu", enabled=False):  # bf16 scores would ruin the KL of peaky rows
        for batch in range(query.shape[0]):
            keys = full_precision(key[batch]).mT
            for rows in row_blocks(query.shape[2], heads * key.shape[2]):
                exponent = full_precision(query[batch, :, rows]) * (scale * LOG2E) @ keys  # [heads, rows, M]
                if lse is None:
                    exponent.sub_(exponent.amax(-1, keepdim=True).sub_(HEADROOM)).exp2_()
                    exponent.mul_(2.0**HEADROOM * weight / heads / exponent.sum(-1, keepdim=True))
                else:
                    exponent.sub_(lse[batch, :, rows, None].to(exponent.dtype) * LOG2E - HEADROOM).exp2_()
                    exponent.mul_(weight / heads)
                mean = exponent.sum(0)
                if accumulate:
                    mean += (full_precision(out[batch, rows]) + HEADROOM).exp2_()
                out[batch, rows] = mean.log2_().sub_(HEADROOM).clamp_min_(FLOOR)


@_head_mean_op.register_fake
def _(
    query: Tensor, key: Tensor, lse: Tensor | None, scale: float, weight: float, accumulate: bool, out: Tensor
) -> None:
    pass


@torch.library.custom_op("trace_sdk::log_sum_exp", mutates_args=())
def _log_sum_exp_op(query: Tensor, key: Tensor, scale: float) -> Tensor:
    if runs_triton(query):
        from trace_sdk.kernels.head_mean_triton import launch_log_sum_exp

        return launch_log_sum_exp(query, key, scale)

    lse = query.new_empty(query.shape[:3], dtype=full_precision(query[:0]).dtype)
    with torch.autocast("cpu", enabled=False):
        for batch in range(query.shape[0]):
            keys = full_precision(key[batch]).mT
            for rows in row_blocks(query.shape[2], query.shape[1] * key.shape[2]):
                lse[batch, :, rows] = (full_precision(query[batch, :, rows]) * scale @ keys).logsumexp(-1)
    return lse


@_log_sum_exp_op.register_fake
def _(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=full_precision(query[:0]).dtype)


@torch.library.custom_op("trace_sdk::image_log_sum_exp", mutates_args=())
def _image_log_sum_exp_op(lse: Tensor, query: Tensor, image_key: Tensor, text_key: Tensor, scale: float) -> Tensor:
    if runs_triton(lse):
        from trace_sdk.kernels.head_mean_triton import launch_image_log_sum_exp

        return launch_image_log_sum_exp(lse, query, image_key, text_key, scale)

    text_share = (_log_sum_exp_op(query, text_key, scale) - lse).exp_()
    image = lse + torch.log1p(-text_share.clamp_max(1 - 1e-7))
    if (text_share > 0.99).any():
        image = torch.where(text_share > 0.99, _log_sum_exp_op(query, image_key, scale), image)
    return image


@_image_log_sum_exp_op.register_fake
def _(lse: Tensor, query: Tensor, image_key: Tensor, text_key: Tensor, scale: float) -> Tensor:
    return torch.empty_like(lse)
