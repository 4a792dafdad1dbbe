"""AuraFlow: joint layers, then one stream, both over [register tokens, text, image]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt


class AuraFlow(LatentBackbone):
    """`AuraFlowTransformer2DModel`."""

    family = "aura-flow"
    architecture = "AuraFlowTransformer2DModel"
    self_attention = r"\.attn$"

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 256, config["joint_attention_dim"])}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        return {"tokens": pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        answer: Tensor = self.denoiser(x_t, prompt["tokens"], t, return_dict=False)[0]
        return answer

    @property
    def most_tokens(self) -> int:
        return math.isqrt(self.denoiser.config.pos_embed_max_size)
