"""PixArt-α and Σ: a diffusion transformer with T5 through cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone, numbers
from trace_sdk.backbones.prompts import Prompt


class PixArt(LatentBackbone):
    """`PixArtTransformer2DModel`; ε, beside a variance that is not read."""

    family = "pixart"
    architecture = "PixArtTransformer2DModel"
    self_attention = r"attn1$"
    cross_attention = r"attn2$"

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 120, config["caption_channels"]), "mask": torch.ones(1, 120, dtype=torch.long)}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        tokens, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"tokens": tokens, "mask": mask}

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        positions = self.denoiser.pos_embed
        height, positions.height = positions.height, None  # the one size whose positions are kept
        try:
            with super().as_graph():
                yield
        finally:
            positions.height = height

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # α at 1024 px
            height, width = (side * self.latent_side for side in x_t.shape[-2:])
            sizes["resolution"] = numbers(x_t, height, width)
            sizes["aspect_ratio"] = numbers(x_t, height / width)
        answer: Tensor = self.denoiser(
            x_t,
            encoder_hidden_states=prompt["tokens"],
            encoder_attention_mask=prompt["mask"],
            timestep=self.noising.timestep(t),
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return answer[:, : self.latent_channels]
