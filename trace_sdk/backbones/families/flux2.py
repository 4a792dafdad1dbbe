"""FLUX.2 dev and klein: X_0 are the VAE's latents in patches of 2×2, normalised by the VAE's own statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt

GUIDANCE = 1.0


class Flux2(LatentBackbone):
    """`Flux2Transformer2DModel`; joint attention over [text, image]."""

    family = "flux2"
    architecture = "Flux2Transformer2DModel"
    vaes = ("AutoencoderKLFlux2",)
    self_attention = r"\.attn$"

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 512, config["joint_attention_dim"])}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        return {"tokens": pipeline.encode_prompt(prompt)[0]}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        height, width = x_t.shape[-2:]
        text = prompt["tokens"].shape[1]
        answer: Tensor = self.denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=prompt["tokens"],
            timestep=t,
            img_ids=positions((1, height, width, 1), t.device),
            txt_ids=positions((1, 1, 1, text), t.device),
            guidance=torch.full_like(t, GUIDANCE),
            return_dict=False,
        )[0]
        return answer.mT.reshape(x_t.shape)

    def scale(self, latents: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(latents, 2)
        statistics = self.vae.bn
        mean, variance = (x.view(1, -1, 1, 1) for x in (statistics.running_mean, statistics.running_var))
        scaled: Tensor = (patches - mean) / (variance + self.vae.config.batch_norm_eps).sqrt()
        return scaled

    @property
    def latent_channels(self) -> int:
        return 4 * int(self.vae.config.latent_channels)

    @property
    def latent_side(self) -> int:
        return 2 * super().latent_side


def positions(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Every index into an array of that shape, in row-major order: [product, 4]."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))
