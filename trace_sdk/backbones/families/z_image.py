"""Z-Image: one stream over [image, text], after two layers for each alone; its t runs from noise to image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.prompts import Prompt

MULTIPLE = 32  # tokens, to which image and text are padded


class ZImage(LatentBackbone):
    """`ZImageTransformer2DModel`; the layers that refine the text alone are not read."""

    family = "z-image"
    architecture = "ZImageTransformer2DModel"
    no_graph = "its diffusers class goes through the images of a batch one by one"
    self_attention = r"^(noise_refiner|layers)\.\d+\.attention$"
    image_first = True
    drops_padding = True

    @classmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        return {"tokens": torch.zeros(1, 32, config["cap_feat_dim"])}

    @classmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        return {"tokens": pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0][None]}

    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        frames = list(x_t[:, :, None].unbind())
        answer = self.denoiser(
            frames, 1 - t, list(prompt["tokens"].unbind()), patch_size=self.cells_per_token, return_dict=False
        )[0]
        return -torch.stack(answer)[:, :, 0]

    def text_tokens(self, image: int, text: int, keys: int) -> slice | None:
        start = -(-image // MULTIPLE) * MULTIPLE
        return super().text_tokens(start, text, keys)

    @property
    def cells_per_token(self) -> int:
        return int(self.denoiser.config.all_patch_size[0])

    @property
    def most_tokens(self) -> int:
        return int(min(self.denoiser.config.axes_lens[1:]))
