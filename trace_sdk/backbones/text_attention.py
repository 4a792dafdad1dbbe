"""The tap on what the image looks at in the text: in cross-attention, or in the joint attention of newer models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt
from trace_sdk.backbones.tap import AttentionCalls, call_of, scale_of


@dataclass(frozen=True)
class TextAttention:
    """Queries of the image's tokens and keys of the text's in one attention call.

    Attributes:
        query: [B, heads, H·W, d], row-major over the token grid, after norm and rotary embedding.
        key: [B, heads, T, d], in the order of the prompt's embeddings.
        grid: (H, W) in tokens.
        scale: factor on query·key before the softmax.
        bias: what the model adds to the scores, −∞ where it masks a key: broadcasts to [B, heads, H·W, T].
    """

    query: Tensor
    key: Tensor
    grid: tuple[int, int]
    scale: float
    bias: Tensor | None = None


OnText = Callable[[TextAttention], None]
ImageAndText = Callable[[int, int], "tuple[slice, tuple[int, int], slice] | None"]
"""(query length, key length) of a call → (slice of the image tokens among the queries, their grid, slice of the text
tokens among the keys), or None if the image does not look at the text in it."""


def attend_to_text(
    backbone: LatentBackbone, prompt: Prompt, x_t: Tensor, t: Tensor | float, on_attention: OnText
) -> Tensor:
    """Denoise once with a prompt (embeddings, batch of 1) and show every call in which the image looks at it.

    Returns:
        The network's answer, of the shape of X_t, the same bits as without being watched.
    """
    latents, text = (x_t.shape[-2], x_t.shape[-1]), prompt["tokens"].shape[1]

    def image_and_text(queries: int, keys: int) -> tuple[slice, tuple[int, int], slice] | None:
        image, grid = backbone.image_tokens(queries, latents)
        found = backbone.text_tokens(grid[0] * grid[1], text, keys)
        return (image, grid, found) if found else None

    with TextAttentionTap(on_attention, image_and_text, backbone.calls_on_text):
        answer: Tensor = backbone(x_t, t, prompt=prompt)
    return answer


class TextAttentionTap(TorchFunctionMode):
    """Context manager that shows what image tokens look at in the text; the model's answer is as without it.

    Args:
        on_attention: called once for each call in which the image looks at the text, in forward order.
        image_and_text: where the two lie in a call.
        calls: of the modules in which the image looks at the text.
    """

    def __init__(self, on_attention: OnText, image_and_text: ImageAndText, calls: AttentionCalls) -> None:
        super().__init__()
        self._on_attention, self._image_and_text, self._calls = on_attention, image_and_text, calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._calls.running is not None:
            call = call_of(args, kwargs)
            query, key = call["query"], call["key"]
            found = self._image_and_text(query.shape[-2], key.shape[-2])
            if found is not None:
                image, grid, text = found
                self._on_attention(
                    TextAttention(
                        query[..., image, :],
                        key[..., text, :],
                        grid,
                        scale_of(call),
                        part_of_mask(call.get("attn_mask"), image, text),
                    )
                )
        return func(*args, **kwargs)


def part_of_mask(mask: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """An attention mask, bool or added to the scores, as what is added for these queries and keys."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    if mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    return mask[..., keys]
