"""Stable Diffusion 1.5 and 2.1: a UNet whose self-attention lies on several grids, ε or v by its scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt


class StableDiffusion(LatentBackbone):
    """`UNet2DConditionModel` with one text encoder."""

    family = "sd"
    architecture = "UNet2DConditionModel"
    part = "unet"
    self_attention = r"attn1$"
    cross_attention = r"attn2$"
    conditions: ClassVar[str | None] = None

    @classmethod
    def matches(cls, config: dict[str, Any]) -> bool:
        classes = config.get("class_embed_type") or config.get("num_class_embeds")  # as unCLIP and the upscaler have
        return config.get("addition_embed_type") == cls.conditions and not classes

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]  # Kolors has a layer between
        return {"tokens": torch.zeros(1, 77, width)}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        return {"tokens": pipeline.encode_prompt(prompt, pipeline.device, 1, False)[0]}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        answer: Tensor = self.denoiser(x_t, self.noising.timestep(t), prompt["tokens"], return_dict=False)[0]
        return answer

    @property
    def cells_per_token(self) -> int:
        """The finest stage that attends; each stage halves the grid."""
        last = len(self.denoiser.config.block_out_channels) - 1
        attending = (
            stage
            for stage in range(last)
            for name in self.attending
            if name.startswith((f"down_blocks.{stage}.", f"up_blocks.{last - stage}."))
        )
        return int(2 ** next(attending, last))

    @property
    def multiple_of(self) -> int:
        """Every stage's grid is then a whole one."""
        return self.latent_side * int(2 ** (len(self.denoiser.config.block_out_channels) - 1))

    def image_tokens(self, queries: int, latents: tuple[int, int]) -> tuple[slice, tuple[int, int]]:
        height, width = latents
        while height * width > queries:
            height, width = height // 2, width // 2
        return slice(None), (height, width)
