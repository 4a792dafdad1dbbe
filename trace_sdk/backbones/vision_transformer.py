"""A plain vision transformer as a control (paper, table 5): self-attention without any noise, so t = 0 only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_sdk.backbones.backbone import OnAttention, check_size
from trace_sdk.backbones.checkpoint import refuse_pickle, sha256_of_folder, unreadable
from trace_sdk.backbones.device import Placed
from trace_sdk.backbones.noising import FlowMatching
from trace_sdk.backbones.tap import SelfAttentionTap
from trace_sdk.errors import ArgumentError

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]
LEAST_TOKENS = 8


class VisionTransformer(Placed):
    """DINOv2 as transformers stores it. Read with `TeacherSettings(timesteps=(0.0,))`, or `label -t 0`."""

    family = "dinov2"
    latent_side = 1
    noising = FlowMatching(predicts="sample")

    def __init__(self, model: Any, identity: str = "") -> None:
        super().__init__()
        self.model, self.identity = model, identity
        self.token_side = self.multiple_of = int(model.config.patch_size)
        self.min_size = LEAST_TOKENS * self.token_side
        self.self_attention_blocks = int(model.config.num_hidden_layers)
        self.total_heads = self.self_attention_blocks * int(model.config.num_attention_heads)

    @classmethod
    def load(cls, folder: Path) -> VisionTransformer:
        """Read a transformers folder (config.json and safetensors). Raises CheckpointError."""
        from transformers import AutoModel

        refuse_pickle(folder)
        try:
            model = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
            )
        except Exception as error:  # transformers and safetensors raise many kinds, one meaning
            raise unreadable(folder, error) from error
        return cls(model.eval().requires_grad_(False), sha256_of_folder(folder))

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels → (H, W) in tokens."""
        return size[0] // self.token_side, size[1] // self.token_side

    def encode(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] as the model was trained: of ImageNet's mean and deviation."""
        check_size(self, images)
        mean, deviation = (images.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, DEVIATION))
        return (images / 2 + 0.5 - mean) / deviation

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        on_attention: OnAttention | None = None,
        *,
        share_softmax: bool = False,
    ) -> Tensor:
        """Read X_0; the answer is X_0 itself, as nothing is denoised.

        Raises:
            ArgumentError: t is not 0.
        """
        if bool((torch.as_tensor(t) != 0).any()):
            raise ArgumentError(f"{self.family} has no timesteps: read it at t = 0 alone (--timestep 0).")
        grid = self.token_grid((x_t.shape[-2], x_t.shape[-1]))
        tokens = grid[0] * grid[1]
        with SelfAttentionTap(
            on_attention or (lambda attention: None),
            lambda queries, keys: (slice(queries - tokens, queries), grid),  # [class, registers, image]
            share_softmax=share_softmax,
        ):
            self.model(x_t)
        return x_t
