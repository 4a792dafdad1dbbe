"""The student: backbone, tap and decoder in one pass at t = 0. No IEP, no ABDiv, no N×N map."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import CheckpointError
from trace_sdk.kernels import per_head_divergence_reference
from trace_sdk.student.decoder import EdgeDecoder
from trace_sdk.teacher.boundary import log_features

LORA_TARGETS = ["to_q", "to_k", "to_v"]


def _checkpoint(block: Any, *inputs: Any) -> Any:
    tap = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), tap if tap else nullcontext())
    )


class Student(nn.Module):
    """Images float [B, 3, H, W] in [−1, 1], sides multiples of 8 from 64 → edge logits [B, H, W] and Î.

    Args:
        backbone: the denoiser whose attention is read.
        decoder: None makes a new one for the backbone's heads and blocks.
        threshold: probability above which a pixel counts as edge, calibrated by `distill`.
    """

    decoder_name = "stem-unet"
    default_size = 448  # longest side that the network sees unless told otherwise, pixels

    def __init__(self, backbone: PixelBackbone, decoder: EdgeDecoder | None = None, threshold: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder or EdgeDecoder(2 * backbone.heads * backbone.self_attention_blocks)
        self.threshold = threshold

    @property
    def family(self) -> str:
        """Of the backbone."""
        return self.backbone.family

    @property
    def multiple_of(self) -> int:
        """Sides of the images are multiples of it, pixels."""
        return self.backbone.multiple_of

    @property
    def min_size(self) -> int:
        """Shortest side, pixels."""
        return self.backbone.min_size

    def weights_sha256(self) -> str:
        """sha256 over the backbone's weights as fp16, for engine metadata."""
        digest = hashlib.sha256()
        for _, value in sorted(self.backbone.transformer.state_dict().items()):
            digest.update(value.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, reconstruction = self.features(images)
        return self.decoder(features, images), reconstruction

    def logits(self, images: Tensor, *, share_softmax: bool = False) -> Tensor:
        """The edge logits alone, [B, H, W]."""
        features, _ = self.features(images, share_softmax=share_softmax)
        logits: Tensor = self.decoder(features, images)
        return logits

    def features(self, images: Tensor, *, share_softmax: bool = False) -> tuple[Tensor, Tensor]:
        """Divergence features [B, 2·heads·blocks, H/8, W/8] of the pass at t = 0, and Î; see `SelfAttentionTap`."""
        maps: list[Tensor] = []

        def add(attention: SelfAttention) -> None:
            maps.append(log_features(per_head_divergence_reference(attention, symmetric=True)))

        reconstruction = self.backbone(images, 0.0, add, share_softmax=share_softmax)
        return torch.cat(maps, 1), reconstruction

    def add_lora(self, rank: int) -> None:
        """Freeze the backbone and put LoRA on its query, key and value projections."""
        from peft import LoraConfig, get_peft_model

        self.backbone.requires_grad_(False)
        if rank:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
            self.backbone.transformer = get_peft_model(self.backbone.transformer, config)

    def checkpoint_activations(self) -> None:
        """Compute the activations of the backbone's blocks again in the backward pass, rather than keep them.

        The tap sees the blocks then, too: what it makes of their attention is computed again as well.
        """
        from diffusers import ModelMixin

        for model in self.backbone.modules():
            if isinstance(model, ModelMixin):
                model.enable_gradient_checkpointing(_checkpoint)

    def merge_lora(self) -> None:
        """Fold LoRA into the backbone's own weights."""
        if hasattr(self.backbone.transformer, "merge_and_unload"):
            self.backbone.transformer = self.backbone.transformer.merge_and_unload()

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write `backbone/`, `decoder.safetensors` and `student.json`; LoRA must be merged."""
        self.backbone.save(folder / "backbone")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.decoder.state_dict().items()}
        write_bytes(folder / "decoder.safetensors", save(weights))
        write_text(folder / "student.json", json.dumps({"threshold": self.threshold, **about}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Read what `save` wrote. Raises CheckpointError if a part is missing or corrupt."""
        folder = Path(folder)
        backbone = PixelBackbone.load(folder / "backbone")
        try:
            about = json.loads((folder / "student.json").read_text())
            student = cls(backbone, threshold=float(about["threshold"]))
            student.decoder.load_state_dict(load((folder / "decoder.safetensors").read_bytes()))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is not a whole student: {error}. Give the folder that `trace-sdk distill -o` wrote."
            ) from error
        return student.eval()
