"""FLUX.1 dev and schnell: latents packed in tokens of 2×2 cells; guidance is an input of dev."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone, pack, unpack
from trace_sdk.backbones.pixel import position_ids
from trace_sdk.backbones.prompts import Prompt

GUIDANCE = 1.0  # no guidance: what is read is the model at the null prompt, not a picture for it


class Flux(LatentBackbone):
    """`FluxTransformer2DModel`; joint attention over [text, image]."""

    family = "flux"
    architecture = "FluxTransformer2DModel"
    self_attention = r"\.attn$"
    words: ClassVar[dict[str, int]] = {"tokenizer_2": 0}

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {
            "tokens": torch.zeros(1, 512, config["joint_attention_dim"]),
            "pooled": torch.zeros(1, config["pooled_projection_dim"]),
        }

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        tokens, pooled, _ = pipeline.encode_prompt(prompt)
        return {"tokens": tokens, "pooled": pooled}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        height, width = x_t.shape[-2:]
        answer = self.denoiser(
            hidden_states=pack(x_t),
            encoder_hidden_states=prompt["tokens"],
            pooled_projections=prompt["pooled"],
            timestep=t,
            img_ids=position_ids((height // 2, width // 2), t),
            txt_ids=t.new_zeros(prompt["tokens"].shape[1], 3),
            guidance=torch.full_like(t, GUIDANCE) if self.denoiser.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return unpack(answer, (height, width))

    @property
    def in_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @property
    def cells_per_token(self) -> int:
        return 2
