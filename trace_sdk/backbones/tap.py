"""The one tap on attention: sees the query and key of every self-attention call of any model.

The same code serves the teacher, the student's forward pass and its ONNX export (DESIGN section 2), because
it hooks `torch.nn.functional.scaled_dot_product_attention` itself rather than any model's own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

# (query, key, value, scale) → what `scaled_dot_product_attention` answers, and the natural log-sum-exp of the scores.
AttentionWithLse = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


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
        joint_lse: float32 [B, heads, H·W], natural log-sum-exp of the scores over image *and* text keys, where the
            model's own attention call left one; `kernels.lse_of` takes the text out of it.
        text_key: [B, heads, T, d], the keys that are not the image's, beside `joint_lse`.
    """

    block: int
    query: Tensor
    key: Tensor
    grid: tuple[int, int]
    scale: float
    mean_key: Tensor | None = None
    joint_lse: Tensor | None = None
    text_key: Tensor | None = None


ImageTokens = Callable[[int, int], "tuple[slice, tuple[int, int]] | None"]
"""(query length, key length) of a call → (slice of the image tokens, their grid), or None if the call is
not self-attention over the image."""


class AttentionCalls:
    """Which module is attending just now, and its number in forward order.

    What tells one kind of attention from another is the module that calls, not how many keys there are. A number stays
    with its module, so that a block that is computed again for its gradients has the one that it had.

    Args:
        modules: those of one kind, each called once in a forward pass, in any order.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.running: nn.Module | None = None
        self._numbers: dict[nn.Module, int] = {}
        self._hooks = []
        for module in modules:  # by bound methods, so that a copied model gets a copy of this
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running = module

    def _leave(self, *_: Any) -> None:
        self.running = None

    def release(self) -> None:
        """Watch no more: torch.compile takes hooked modules for different programs, though they are alike."""
        for hook in self._hooks:
            hook.remove()

    def number(self) -> int:
        """Of the module that is attending."""
        assert self.running is not None
        return self._numbers.setdefault(self.running, len(self._numbers))


class SelfAttentionTap(TorchFunctionMode):
    """Context manager that shows each self-attention call to `on_attention` and leaves the model's answer as it is.

    Attention calls that `on_attention` makes itself are not seen again: torch takes a function mode off the
    stack while its handler runs.

    Args:
        on_attention: called once a self-attention call, in forward order.
        image_tokens: tells image tokens from text tokens, and without `calls` self-attention from cross-attention.
        calls: tells self-attention by the module that calls, and numbers the blocks; None: they are counted.
        share_softmax: compute `mean_key` and the model's own answer from one explicit softmax. Saves a third of
            the attention's work where no fused kernel exists, as in an exported graph, at an N×N map a head; the
            answer is then equal up to rounding only.
    """

    def __init__(
        self,
        on_attention: Callable[[SelfAttention], None],
        image_tokens: ImageTokens,
        calls: AttentionCalls | None = None,
        *,
        share_softmax: bool = False,
    ) -> None:
        super().__init__()
        self._share_softmax = share_softmax
        self._on_attention = on_attention
        self._image_tokens, self._calls = image_tokens, calls
        self._counted = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (self._calls is None or self._calls.running is not None):
            call = call_of(args, kwargs)
            query, key, value, scale = call["query"], call["key"], call["value"], scale_of(call)
            found = self._image_tokens(query.shape[-2], key.shape[-2])
            if found is not None:
                tokens, grid = found
                answer = mean_key = joint_lse = text_key = None
                if self._share_softmax:
                    answer, mean_key = attention_with_mean_key(query, key, value, tokens, scale)
                elif (attend := leaves_lse(query, key, value, args, kwargs)) is not None:
                    answer, joint_lse = attend(query, key, value, kwargs.get("scale"))
                    joint_lse, text_key = joint_lse[..., tokens], keys_outside(key, tokens)
                image_query, image_key = query[..., tokens, :], key[..., tokens, :]
                block = self._counted if self._calls is None else self._calls.number()
                self._counted += 1
                self._on_attention(
                    SelfAttention(block, image_query, image_key, grid, scale, mean_key, joint_lse, text_key)
                )
                if answer is not None:
                    return answer
        return func(*args, **kwargs)


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `scaled_dot_product_attention`, by name."""
    return {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}


def scale_of(call: dict[str, Any]) -> float:
    """The factor on query·key in such a call."""
    scale: float = call["query"].shape[-1] ** -0.5 if call.get("scale") is None else call["scale"]
    return scale


def leaves_lse(
    query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> AttentionWithLse | None:
    """Where torch would answer this call by a kernel that can leave its log-sum-exp: that kernel, for these tensors."""
    kwargs = kwargs or {}
    device = query.device.type
    special = kwargs.get("attn_mask") is not None or any(
        kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")
    )
    if len(args) > 3 or special or torch.compiler.is_compiling() or device not in ("cpu", "cuda"):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    if len({query.dtype, key.dtype, value.dtype}) > 1 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != query.dtype
    ):
        return None  # torch would attend with other numbers than these
    if device == "cuda" and query.shape[-1] % 8:
        return None  # torch would pad the heads first
    chosen: int = torch._fused_sdp_choice(query, key, value, None, 0.0, False, scale=kwargs.get("scale"))
    return _KERNELS.get((device, chosen))


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    answer, lse = flash(query, key, value, 0.0, False, scale=scale)
    return answer, lse


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    answer, lse = flash(query, key, value, 0.0, False, False, scale=scale)[:2]
    return answer, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """What torch chooses on an H100."""
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    answer, lse = cudnn(query, key, value, None, True, 0.0, False, False, scale=scale)[:2]
    return answer, lse.view(query.shape[:3])


_KERNELS: dict[tuple[str, int], AttentionWithLse] = {
    ("cpu", int(SDPBackend.FLASH_ATTENTION.value)): _flash_on_cpu,
    ("cuda", int(SDPBackend.FLASH_ATTENTION.value)): _flash,
    ("cuda", int(SDPBackend.CUDNN_ATTENTION.value)): _cudnn,
}


def keys_outside(key: Tensor, tokens: slice) -> Tensor:
    """The keys before and after a slice; no copy where they lie on one side of it."""
    first, last, _ = tokens.indices(key.shape[-2])
    before, after = key[..., :first, :], key[..., last:, :]
    if not before.shape[-2]:
        return after
    return torch.cat([before, after], -2) if after.shape[-2] else before


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
