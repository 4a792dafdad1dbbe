"""What the teacher and the student need of a backbone: an image and t in, self-attention out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from trace_sdk.backbones.noising import Noising
from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError

OnAttention = Callable[[SelfAttention], None]


class Backbone(Protocol):
    """A frozen denoiser. Images are float [B, 3, H, W] in [−1, 1], RGB; t is in [0, 1], see `noising`.

    X_t is what the denoiser sees: the pixels themselves, or latents [B, C, h, w].
    """

    @property
    def family(self) -> str:
        """Its name, as `trace_sdk.backbones.registry.families` lists it."""
        ...

    @property
    def multiple_of(self) -> int:
        """Sides of images are multiples of it, in pixels."""
        ...

    @property
    def min_size(self) -> int:
        """Shortest side of an image, in pixels."""
        ...

    @property
    def latent_side(self) -> int:
        """Side of one cell of X_t, in pixels; 1 where X_t is the image."""
        ...

    @property
    def token_side(self) -> int:
        """Side of a token of the finest self-attention, in pixels; a multiple of `latent_side`."""
        ...

    @property
    def self_attention_blocks(self) -> int:
        """Number of self-attention calls in one forward pass."""
        ...

    @property
    def total_heads(self) -> int:
        """Heads of all these calls together."""
        ...

    @property
    def noising(self) -> Noising:
        """How it was noised in training."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        ...

    @property
    def identity(self) -> str:
        """sha256 of all that determines its answers."""
        ...

    def eval(self) -> Self:
        """Evaluation mode."""
        ...

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of an image in pixels → (H, W) of the finest self-attention in tokens."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images → X_0, float32. The same image gives the same X_0. Raises ArgumentError for a size it can't take."""
        ...

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | float,
        on_attention: OnAttention | None = None,
        *,
        share_softmax: bool = False,
    ) -> Tensor:
        """Denoise once with the null prompt → the network's answer, of the shape of X_t; see `noising`.

        Args:
            on_attention: shown every self-attention call on the way; see `SelfAttentionTap`.
            share_softmax: see `SelfAttentionTap`.
        """
        ...


class StudentBackbone(Backbone, Protocol):
    """A backbone that a student can be made of: one that LoRA goes on and that can be kept. A module, too.

    Attributes:
        denoiser: the network itself.
        attending: the modules that attend among image tokens, by their name in the denoiser.
    """

    denoiser: Any
    attending: dict[str, nn.Module]

    @property
    def native_size(self) -> int:
        """Longest side of an image that suits it best, in pixels."""
        ...

    @property
    def most_tokens(self) -> int | None:
        """Longest side of an image in tokens, where the model has learnt positions; None for any."""
        ...

    def as_graph(self) -> AbstractContextManager[None]:
        """While it is traced for an export."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `open_backbone` reads; LoRA must be merged."""
        ...


def check_size(backbone: Backbone, images: Tensor) -> None:
    """Raise ArgumentError unless a backbone takes images [B, 3, H, W] of that size."""
    step, least, (height, width) = backbone.multiple_of, backbone.min_size, images.shape[-2:]
    if height % step or width % step or min(height, width) < least:
        raise ArgumentError(
            f"{backbone.family} takes sides that are multiples of {step} from {least}; got {height}×{width}. "
            "Pad or resize the image first."
        )
