"""Published models' sizes on the meta device, which holds no weights: blocks, heads and grids of each."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from trace_sdk.backbones.registry import families

FOUR = (128, 256, 512, 512)
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35 = {
    "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096, "qk_norm": "rms_norm",
    "pooled_projection_dim": 2048,
}  # fmt: skip
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}  # fmt: skip


def attentions_of(name: str, settings: dict[str, Any], vae: dict[str, Any], kind: str = "AutoencoderKL") -> Any:
    """The backbone of these sizes, without weights."""
    family = families()[name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, family.architecture)(**settings)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        made = getattr(diffusers, kind)(
            **({"block_out_channels": FOUR} | blocks if kind == "AutoencoderKL" else {}) | vae
        )
    assert family.matches(dict(denoiser.config))
    return family(denoiser, made, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "")


@pytest.mark.parametrize(
    ("name", "settings", "vae", "blocks", "heads", "side", "grid"),
    [
        ("sd", {"cross_attention_dim": 768, "attention_head_dim": 8}, {}, 16, 128, 512, 64),
        ("sd", {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}, {}, 16, 195, 768, 96),
        ("sdxl", SDXL, {}, 70, 1300, 1024, 64),
        ("pixart", {"num_layers": 28}, {}, 28, 448, 1024, 64),
        ("sd3", SD35 | LARGE, {"latent_channels": 16}, 38, 38 * 38, 1024, 64),
        ("sd3", SD35 | MEDIUM, {"latent_channels": 16}, 24 + 13, 37 * 24, 1024, 64),
        ("flux", {"guidance_embeds": True}, {"latent_channels": 16}, 57, 57 * 24, 1024, 64),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL", "PixArt", "SD 3.5 large", "SD 3.5 medium", "FLUX.1"],
)
def test_published_sizes(
    name: str, settings: dict[str, Any], vae: dict[str, Any], blocks: int, heads: int, side: int, grid: int
) -> None:
    backbone = attentions_of(name, settings, vae)
    assert (backbone.self_attention_blocks, backbone.total_heads) == (blocks, heads)
    assert backbone.token_grid((side, side)) == (grid, grid) and side % backbone.multiple_of == 0


@pytest.mark.parametrize(
    ("name", "vae", "kind", "blocks", "heads"),
    [
        ("flux2", {}, "AutoencoderKLFlux2", 56, 56 * 48),
        ("qwen-image", {}, "AutoencoderKLQwenImage", 60, 60 * 24),
        ("z-image", {"latent_channels": 16}, "AutoencoderKL", 32, 32 * 30),
        ("lumina2", {"latent_channels": 16}, "AutoencoderKL", 28, 28 * 24),
        ("aura-flow", {}, "AutoencoderKL", 36, 36 * 12),
    ],
)
def test_published_sizes_that_are_the_classes_defaults(
    name: str, vae: dict[str, Any], kind: str, blocks: int, heads: int
) -> None:
    backbone = attentions_of(name, {}, vae, kind)
    assert (backbone.self_attention_blocks, backbone.total_heads) == (blocks, heads)
    assert backbone.token_grid((1024, 768)) == (64, 48)
