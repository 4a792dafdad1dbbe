"""Our own backbone: a stock diffusers `FluxTransformer2DModel` on 8×8 pixel patches, so no VAE (DESIGN section 5).

Flow matching with x-prediction: x_t = (1 − t)·x + t·ε, and the network answers x̂ directly.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from trace_sdk.atomic import write_text
from trace_sdk.backbones.backbone import OnAttention, check_size
from trace_sdk.backbones.checkpoint import refuse_pickle, sha256_of_folder, write_weights
from trace_sdk.backbones.device import Placed
from trace_sdk.backbones.latent import read_part
from trace_sdk.backbones.noising import FlowMatching
from trace_sdk.backbones.tap import AttentionCalls, SelfAttentionTap
from trace_sdk.errors import CheckpointError

PATCH = 8
CHANNELS = 3 * PATCH * PATCH
SMALL = {"num_single_layers": 8, "num_attention_heads": 4}


class PixelBackbone(Placed):
    """A pixel-space denoiser seen as "image, timestep → attention".

    Images are float [B, 3, H, W] in [−1, 1], RGB, H and W multiples of 8 from 64. Timesteps are t in [0, 1]:
    0 is the image itself, 1 pure noise.
    """

    family = "pixel-flux"
    multiple_of = PATCH
    min_size = 64
    latent_side = 1
    token_side = PATCH
    native_size = 448
    most_tokens = None
    noising = FlowMatching(predicts="sample")

    def __init__(self, denoiser: FluxTransformer2DModel, identity: str = "") -> None:
        super().__init__()
        self.denoiser, self.identity = denoiser, identity
        blocks = denoiser.single_transformer_blocks
        self.attending = {f"single_transformer_blocks.{i}.attn": block.attn for i, block in enumerate(blocks)}
        self._calls = AttentionCalls(self.attending.values())

    @classmethod
    def create(cls, *, num_single_layers: int, num_attention_heads: int) -> PixelBackbone:
        """A backbone with random weights; adaLN projections start at zero, so each block starts as identity."""
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=CHANNELS,
            num_layers=0,
            num_single_layers=num_single_layers,
            attention_head_dim=64,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        )
        for block in model.single_transformer_blocks:
            nn.init.zeros_(block.norm.linear.weight)
            nn.init.zeros_(block.norm.linear.bias)
        return cls(model)

    @classmethod
    def load(cls, folder: str | Path) -> PixelBackbone:
        """Read a diffusers folder (config.json and safetensors).

        Raises:
            CheckpointError: the folder or a file is missing, corrupt, pickled, or holds another architecture.
        """
        folder = Path(folder)
        config_file = folder / "config.json"
        refuse_pickle(folder)
        if not config_file.is_file():
            raise CheckpointError(f"{folder} has no config.json. Give the folder that `trace-sdk pretrain -o` wrote.")
        try:
            config = json.loads(config_file.read_text())
            name, channels = config["_class_name"], config["in_channels"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{config_file} is not a diffusers config: {error}.") from error
        if name != "FluxTransformer2DModel" or channels != CHANNELS:
            raise CheckpointError(
                f"{folder} holds a {name} with {channels} input channels; a pixel backbone is a "
                f"FluxTransformer2DModel with {CHANNELS}. Give a folder that `trace-sdk pretrain` wrote."
            )
        return cls(read_part(FluxTransformer2DModel, folder, torch.float32).eval(), sha256_of_folder(folder))

    def save(self, folder: str | Path) -> None:
        """Write config.json and fp16 safetensors, as diffusers does, so that diffusers reads it too."""
        write_weights(Path(folder) / "diffusion_pytorch_model.safetensors", self.denoiser.state_dict())
        write_text(Path(folder) / "config.json", self.denoiser.to_json_string())

    @staticmethod
    def sha256(folder: str | Path) -> str:
        """sha256 over the weight files of a folder, for engine metadata."""
        return sha256_of_folder(folder)

    @property
    def self_attention_blocks(self) -> int:
        """Number of self-attention calls in one forward pass."""
        return int(self.denoiser.config.num_single_layers)

    @property
    def heads(self) -> int:
        """Heads in each block."""
        return int(self.denoiser.config.num_attention_heads)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels → (H, W) in tokens."""
        return size[0] // PATCH, size[1] // PATCH

    @property
    def total_heads(self) -> int:
        """Heads of all blocks together."""
        return self.heads * self.self_attention_blocks

    def as_graph(self) -> AbstractContextManager[None]:
        """It is a graph for any size as it is."""
        return nullcontext()

    def compile_blocks(self) -> None:
        """Compile one block for all, for training: the tap is let go, so that no attention can be shown any more."""
        self._calls.release()
        self.denoiser.compile_repeated_blocks(dynamic=False)

    def encode(self, images: Tensor) -> Tensor:
        """X_0 is the image itself."""
        return images

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        on_attention: OnAttention | None = None,
        *,
        share_softmax: bool = False,
    ) -> Tensor:
        """Denoise once: x_t [B, 3, H, W] and t (a number or [B]) → x̂ [B, 3, H, W].

        Args:
            on_attention: shown every self-attention call on the way; see `SelfAttentionTap`.
            share_softmax: see `SelfAttentionTap`.

        Raises:
            ArgumentError: a side is not a multiple of 8 or below 64.
        """
        batch, _, height, width = x_t.shape
        if not torch.compiler.is_exporting():
            check_size(self, x_t)
        grid = (height // PATCH, width // PATCH)
        tokens = F.pixel_unshuffle(x_t, PATCH).flatten(2).transpose(1, 2)  # [B, N, 192]
        inputs: dict[str, Any] = {
            "hidden_states": tokens,
            "encoder_hidden_states": x_t.new_zeros(batch, 1, 64),
            "pooled_projections": x_t.new_zeros(batch, 64),
            "timestep": t if isinstance(t, Tensor) else x_t.new_full((batch,), t),
            "img_ids": position_ids(grid, x_t),
            "txt_ids": x_t.new_zeros(1, 3),
            "return_dict": False,
        }
        tap: AbstractContextManager[object] = nullcontext()
        if on_attention is not None:
            # Joint attention, the one null text token first: [text, image].
            image = slice(1, None)
            tap = SelfAttentionTap(
                on_attention, lambda queries, keys: (image, grid), self._calls, share_softmax=share_softmax
            )
        reduced = x_t.device.type != "meta" and torch.is_autocast_enabled(x_t.device.type)
        with tap, _unremarked_norms() if reduced else nullcontext():
            answer = self.denoiser(**inputs)[0]
        return F.pixel_shuffle(answer.transpose(1, 2).unflatten(2, grid), PATCH)


@contextmanager
def _unremarked_norms() -> Iterator[None]:
    """Without torch's remark that norms with fp32 weights see bf16 under autocast, which nobody need change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        yield


def position_ids(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Rotary position ids (0, row, column) of each token: [N, 3]."""
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype)
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
