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
    """

    block: int
    query: Tensor
    key: Tensor
    grid: tuple[int, int]
    scale: float


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
    """

    def __init__(self, on_attention: Callable[[SelfAttention], None], image_tokens: ImageTokens) -> None:
        super().__init__()
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
                self._on_attention(
                    SelfAttention(
                        block=self._block,
                        query=query[..., tokens, :],
                        key=key[..., tokens, :],
                        grid=grid,
                        scale=query.shape[-1] ** -0.5 if scale is None else scale,
                    )
                )
                self._block += 1
        return func(*args, **kwargs)


def attention_map(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ·scale), one map a head: [B, heads, N, d] twice → [B, heads, N, N], rows sum to 1."""
    return torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1)
