"""Stable Diffusion 3 and 3.5, medium (with image-only attention beside the joint one) and large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt


class StableDiffusion3(LatentBackbone):
    """`SD3Transformer2DModel`; joint attention over [image, text]."""

    family = "sd3"
    architecture = "SD3Transformer2DModel"
    self_attention = r"\.attn2?$"
    image_first = True
    words: ClassVar[dict[str, int]] = {"tokenizer": 0, "tokenizer_3": 77}

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {
            "tokens": torch.zeros(1, 77 + 256, config["joint_attention_dim"]),  # CLIP's and T5's
            "pooled": torch.zeros(1, config["pooled_projection_dim"]),
        }

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        return {"tokens": tokens, "pooled": pooled}

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        """Positions are cut out of their table at (most − side)//2, which ONNX, halving towards zero, gets wrong."""
        positions = self.denoiser.pos_embed
        positions.cropped_pos_embed = partial(middle, positions)
        try:
            with super().as_graph():
                yield
        finally:
            del positions.cropped_pos_embed

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        answer: Tensor = self.denoiser(
            x_t, prompt["tokens"], prompt["pooled"], self.noising.timestep(t), return_dict=False
        )[0]
        return answer

    @property
    def most_tokens(self) -> int:
        return int(self.denoiser.config.pos_embed_max_size)


def middle(positions: Any, *latents: int) -> Tensor:
    """The middle of a `PatchEmbed`'s table for latents of that size, [1, tokens, d], by halves of positive numbers."""
    most = positions.pos_embed_max_size
    table: Tensor = positions.pos_embed.unflatten(1, (most, most))
    for axis, side in enumerate(latents, start=1):
        tokens = side // positions.patch_size
        table = table.narrow(axis, most // 2 - (tokens + 1 - most % 2) // 2, tokens)
    return table.flatten(1, 2)
