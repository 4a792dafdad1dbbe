"""Stable Diffusion XL: the UNet with a second text encoder and the image's size as conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.backbones.latent import numbers
from trace_sdk.backbones.prompts import Prompt


class StableDiffusionXL(StableDiffusion):
    """`UNet2DConditionModel` with added conditions "text_time"."""

    family = "sdxl"
    conditions = "text_time"

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {**super().zero_prompt(config), "pooled": torch.zeros(1, pooled)}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        # The unconditional half of guidance: zeros where the model was trained with zeros for "no text".
        tokens, no_tokens, pooled, no_pooled = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
        return {"tokens": tokens, "pooled": pooled} if prompt else {"tokens": no_tokens, "pooled": no_pooled}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        height, width = (side * self.latent_side for side in x_t.shape[-2:])
        sizes = numbers(x_t, height, width, 0, 0, height, width)  # original, cropped at, target
        answer: Tensor = self.denoiser(
            x_t,
            self.noising.timestep(t),
            prompt["tokens"],
            added_cond_kwargs={"text_embeds": prompt["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
        return answer
