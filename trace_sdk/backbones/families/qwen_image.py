"""Qwen-Image: FLUX's packing with a VAE made for video, whose one frame is the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone, pack, unpack
from trace_sdk.backbones.prompts import Prompt


class QwenImage(LatentBackbone):
    """`QwenImageTransformer2DModel`; joint attention over [text, image]."""

    family = "qwen-image"
    architecture = "QwenImageTransformer2DModel"
    vaes = ("AutoencoderKLQwenImage",)
    self_attention = r"\.attn$"
    words: ClassVar[dict[str, int]] = {"tokenizer": -34}  # the template before the prompt is cut off
    drops_padding = True

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 6, config["joint_attention_dim"])}  # the template without any words

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        # With one prompt there is no padding, so no mask is needed.
        return {"tokens": pipeline.encode_prompt(prompt)[0]}

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        """ONNX has no complex numbers: the tables of e^(iφ) become φ, and a rotation takes its cosine and sine."""
        tables, rotate = self.denoiser.pos_embed, transformer_qwenimage.apply_rotary_emb_qwen
        kept = tables.pos_freqs, tables.neg_freqs
        tables.pos_freqs, tables.neg_freqs = (table.angle() for table in kept)
        transformer_qwenimage.apply_rotary_emb_qwen = rotated
        try:
            with super().as_graph():
                yield
        finally:
            tables.pos_freqs, tables.neg_freqs = kept
            transformer_qwenimage.apply_rotary_emb_qwen = rotate

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        height, width = x_t.shape[-2:]
        answer = self.denoiser(
            hidden_states=pack(x_t),
            encoder_hidden_states=prompt["tokens"],
            timestep=t,
            img_shapes=[[(1, height // 2, width // 2)]],  # one stands for all
            return_dict=False,
        )[0]
        return unpack(answer, (height, width))

    def posterior_mean(self, images: Tensor) -> Tensor:
        return super().posterior_mean(images[:, :, None])[:, :, 0]

    @property
    def in_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.z_dim)

    @property
    def latent_side(self) -> int:
        return int(2 ** len(self.vae.config.temperal_downsample))

    @property
    def cells_per_token(self) -> int:
        return 2


def rotated(x: Tensor, angles: Tensor, use_real: bool = False) -> Tensor:
    """Pairs of values in x [B, N, heads, d] turned by angles [N, d/2]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [N, 1, d/2]
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).type_as(x)
