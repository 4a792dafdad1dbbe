"""Lumina-Image 2.0: one stream over [text, image], after two layers for each alone; its t runs from noise to image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt


class Lumina2(LatentBackbone):
    """`Lumina2Transformer2DModel`; the layers that refine the text alone are not read."""

    family = "lumina2"
    architecture = "Lumina2Transformer2DModel"
    no_graph = "its diffusers class goes through the images of a batch one by one"
    self_attention = r"^(noise_refiner|layers)\.\d+\.attn$"
    drops_padding = True

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 8, config["cap_feat_dim"])}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        tokens, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"tokens": tokens[:, : int(mask.sum())]}  # padding would only be masked again

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        tokens = prompt["tokens"]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        answer: Tensor = self.denoiser(x_t, 1 - t, tokens, mask, return_dict=False)[0]
        return -answer

    @property
    def most_tokens(self) -> int:
        return int(min(self.denoiser.config.axes_lens[1:]))
