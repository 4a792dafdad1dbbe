"""The one tap on attention: sees the query and key of every self-attention call of any model.

The same code serves the teacher, the student's forward pass and its ONNX export (DESIGN section 2), because
it hooks `torch.nn.functional.scaled_dot_product_attention` itself rather than any model's own classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class SelfAttention:
    """Query and key of one self-attention call, image tokens only, after norm and rotary embedding.

    Attributes:
        block: running number of the self-attention call within the forward pass, from 0.
        query: [B, heads, H·W, d], row-major over the token grid.
        key: [B, heads, H·W, d].
        grid: (H, W) in tokens.
        scale: factor on query·key before the softmax, 1/√d unless the model says otherwise.
        mean_key: [B, heads, H·W, d], softmax(QKᵀ·scale)·K over the image tokens, where the tap was asked for it.
    """

    block: int
    query: Tensor
    key: Tensor
    grid: tuple[int, int]
    scale: float
    mean_key: Tensor | None = None


ImageTokens = Callable[[int, int], "tuple[slice, tuple[int, int]] | None"]
"""(query length, key length) of a call → (slice of the image tokens, their grid), or None if the call is
not self-attention over the image."""


class SelfAttentionTap(TorchFunctionMode):
    """Context manager that shows each self-attention call to `on_attention` and leaves the model's answer as it is.

    Attention calls that `on_attention` makes itself are not seen again: torch takes a function mode off the
    stack while its handler runs.

    Args:
        on_attention: called once a self-attention call, in forward order.
        image_tokens: tells self-attention from cross-attention, and image tokens from text tokens.
        share_softmax: compute `mean_key` and the model's own answer from one explicit softmax. Saves a third of
            the attention's work where no fused kernel exists, as in an exported graph, at an N×N map a head; the
            answer is then equal up to rounding only.
    """

    def __init__(
        self,
        on_attention: Callable[[SelfAttention], None],
        image_tokens: ImageTokens,
        *,
        share_softmax: bool = False,
    ) -> None:
        super().__init__()
        self._share_softmax = share_softmax
        self._on_attention = on_attention
        self._image_tokens = image_tokens
        self._block = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            found = self._image_tokens(query.shape[-2], key.shape[-2])
            if found is not None:
                tokens, grid = found
                scale = kwargs.get("scale")
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                answer = mean_key = None
                if self._share_softmax:
                    value = args[2] if len(args) > 2 else kwargs["value"]
                    answer, mean_key = attention_with_mean_key(query, key, value, tokens, scale)
                image_query, image_key = query[..., tokens, :], key[..., tokens, :]
                self._on_attention(SelfAttention(self._block, image_query, image_key, grid, scale, mean_key))
                self._block += 1
                if answer is not None:
                    return answer
        return func(*args, **kwargs)


def attention_map(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ·scale), one map a head: [B, heads, N, d] twice → [B, heads, N, N], rows sum to 1."""
    return torch.softmax((query * scale) @ key.transpose(-1, -2), dim=-1)


def attention_with_mean_key(
    query: Tensor, key: Tensor, value: Tensor, tokens: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention's answer, and its mean key over `tokens` alone, from one softmax and one product.

    The values are widened to [V, K on `tokens`, 1 on `tokens`]; the last column gives the probability mass on
    `tokens`, by which the mean key is renormalised.

    Returns:
        answer [B, heads, N, d] of all queries, and mean key [B, heads, len(tokens), d] of those in `tokens`.
    """
    inside = torch.zeros_like(key[..., :1])
    inside[..., tokens, :] = 1
    widened = attention_map(query, key, scale) @ torch.cat([value, key * inside, inside], dim=-1)
    answer, summed, mass = torch.split(widened, [value.shape[-1], key.shape[-1], 1], dim=-1)
    return answer, summed[..., tokens, :] / mass[..., tokens, :]
