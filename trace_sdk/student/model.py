"""The student: backbone, tap and decoder in one pass at t = 0. No IEP, no ABDiv, no N×N map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from trace_sdk.backbones.backbone import Backbone, OnAttention, StudentBackbone
from trace_sdk.backbones.checkpoint import write_tensors
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.kernels import per_head_divergence_reference
from trace_sdk.student.decoder import EdgeDecoder
from trace_sdk.student.record import read_record, recorded
from trace_sdk.teacher.boundary import log_features

PROJECTIONS = ("to_q", "to_k", "to_v", "to_qkv_mlp_proj")  # the last in FLUX.2's single blocks, all in one
LONGEST = 768  # pixels in one piece, unless the backbone was made for larger images


class _Enough(Exception):
    """The last block that is read was read."""


def _checkpoint(block: Any, *inputs: Any) -> Any:
    tap = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), tap if tap else nullcontext())
    )


class Student(nn.Module):
    """Images float [B, 3, H, W] in [−1, 1], sides as `multiple_of` and `min_size` say → edge logits [B, H, W].

    Args:
        backbone: the denoiser whose attention is read, and what makes its X_0 of an image.
        decoder: None makes a new one for what is read.
        blocks: numbers of the self-attention blocks that are read, None for all. Those after the last one of them are
            not computed for an answer.
        threshold: probability above which a pixel counts as edge, calibrated by `distill`.

    Raises:
        ArgumentError: a backbone that is no denoiser, or `blocks` that it does not have.
    """

    decoder_name = "stem-unet"

    def __init__(
        self,
        backbone: Backbone,
        decoder: EdgeDecoder | None = None,
        *,
        blocks: Sequence[int] | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        last = backbone.self_attention_blocks - 1
        if not hasattr(backbone, "denoiser"):
            raise ArgumentError(f"A student needs a backbone that denoises images; {backbone.family} is a control.")
        if blocks is not None and (not blocks or not all(0 <= block <= last for block in blocks)):
            raise ArgumentError(f"blocks must lie in 0 … {last} for this backbone, got {list(blocks)}.")
        self.backbone: StudentBackbone = backbone  # type: ignore[assignment]
        self.blocks = tuple(range(last + 1)) if blocks is None else tuple(sorted(set(blocks)))
        self.decoder = decoder or EdgeDecoder(2 * self._heads())
        self.threshold = threshold

    def _heads(self) -> int:
        """Heads of the blocks that are read: in all, or seen in a pass over the smallest image."""
        if len(self.blocks) == self.backbone.self_attention_blocks:
            return self.backbone.total_heads
        side = self.backbone.min_size
        heads: list[int] = []
        with torch.no_grad():
            clean = self.backbone.encode(torch.zeros(1, 3, side, side, device=self.backbone.device))
            self.read(clean, lambda attention: heads.append(attention.query.shape[1]))
        return sum(heads)

    @property
    def family(self) -> str:
        """Of the backbone."""
        return self.backbone.family

    @property
    def no_graph(self) -> str:
        """Why it cannot be exported; empty if it can."""
        return getattr(self.backbone, "no_graph", "")

    @property
    def multiple_of(self) -> int:
        """Sides of the images are multiples of it, pixels."""
        return self.backbone.multiple_of

    @property
    def min_size(self) -> int:
        """Shortest side, pixels."""
        return self.backbone.min_size

    @property
    def default_size(self) -> int:
        """Longest side that the network sees unless told otherwise, pixels."""
        return self.backbone.native_size

    @property
    def max_size(self) -> int:
        """Longest side in one piece, pixels."""
        most = self.backbone.most_tokens
        longest = max(LONGEST, self.default_size)
        if most is not None:
            longest = min(longest, most * self.backbone.token_side)
        return longest // self.multiple_of * self.multiple_of

    def weights_sha256(self) -> str:
        """sha256 over the backbone's weights as fp16, for engine metadata."""
        digest = hashlib.sha256()
        for _, value in sorted(self.backbone.state_dict().items()):  # type: ignore[attr-defined]
            digest.update(value.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()

    def logits(self, images: Tensor, *, share_softmax: bool = False) -> Tensor:
        """The edge logits, [B, H, W], by no more of the backbone than they need; see `SelfAttentionTap`."""
        logits: Tensor = self.decoder(self.maps(images, share_softmax=share_softmax), images)
        return logits

    def maps(self, images: Tensor, *, share_softmax: bool = False) -> list[Tensor]:
        """What the decoder reads beside the images: divergence features [B, 2·heads, H_k, W_k] of each block."""
        maps: list[Tensor] = []
        self.read(self.encode(images), lambda attention: maps.append(features_of(attention)), share_softmax)
        return maps

    def encode(self, images: Tensor) -> Tensor:
        """X_0; nothing is learnt there."""
        with torch.no_grad():
            return self.backbone.encode(images)

    def features(self, clean: Tensor) -> tuple[list[Tensor], Tensor]:
        """Divergence features of the blocks that are read, [B, 2·heads, H_k, W_k] each, and the backbone's answer.

        From a whole pass at t = 0 over X_0.
        """
        maps: dict[int, Tensor] = {}  # a block that is computed again for its gradients comes twice

        def add(attention: SelfAttention) -> None:
            if attention.block in self.blocks:
                maps[attention.block] = features_of(attention)

        answer = self.backbone(clean, 0.0, add)
        return list(maps.values()), answer

    def read(self, clean: Tensor, on_attention: OnAttention, share_softmax: bool = False) -> None:
        """Show the blocks that are read, of a pass at t = 0 over X_0 that ends with the last one of them."""

        def add(attention: SelfAttention) -> None:
            if attention.block in self.blocks:
                on_attention(attention)
            # An export cannot follow an exception; it leaves out by itself what no answer needs.
            if attention.block == self.blocks[-1] and not torch.compiler.is_exporting():
                raise _Enough

        try:
            self.backbone(clean, 0.0, add, share_softmax=share_softmax)
        except _Enough:
            return

    def reconstruction_target(self, clean: Tensor, untouched: Tensor | None) -> Tensor:
        """What the backbone's answer at t = 0 is to be, of the shape of X_0; see `losses.reconstruction_loss`.

        Args:
            untouched: its answer where LoRA has not learnt anything yet, else None.
        """
        if self.backbone.noising.predicts == "sample":
            return clean
        if untouched is not None:
            return untouched
        adapted = self.backbone.denoiser
        plain = adapted.disable_adapter() if hasattr(adapted, "disable_adapter") else nullcontext()
        with torch.no_grad(), plain:
            return self.backbone(clean, 0.0)

    def add_lora(self, rank: int) -> None:
        """Freeze the backbone and put LoRA on the projections to query, key and value of its self-attention."""
        from peft import LoraConfig, get_peft_model

        self.backbone.requires_grad_(False)  # type: ignore[attr-defined]
        if rank:
            targets = [
                f"{name}.{projection}"
                for name, module in self.backbone.attending.items()
                for projection in PROJECTIONS
                if hasattr(module, projection)
            ]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
            self.backbone.denoiser = get_peft_model(self.backbone.denoiser, config)

    def checkpoint_activations(self) -> None:
        """Compute the activations of the denoiser's blocks again in the backward pass, rather than keep them.

        The tap sees the blocks then, too: what it makes of their attention is computed again as well.
        """
        from diffusers import ModelMixin

        for model in self.backbone.denoiser.modules():
            if isinstance(model, ModelMixin):
                model.enable_gradient_checkpointing(_checkpoint)

    def merge_lora(self) -> None:
        """Fold LoRA into the backbone's own weights; bf16 ones become fp16, which holds them and the small change."""
        if hasattr(self.backbone.denoiser, "merge_and_unload"):
            if self.backbone.dtype == torch.bfloat16:
                self.backbone.denoiser.half()
            self.backbone.denoiser = self.backbone.denoiser.merge_and_unload()

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write `backbone/`, `decoder.safetensors` and `student.json`; LoRA must be merged."""
        with recorded(folder, {"threshold": self.threshold, "blocks": self.blocks, **about}):
            self.backbone.save(folder / "backbone")
            write_tensors(folder / "decoder.safetensors", self.decoder.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Read what `save` wrote. Raises CheckpointError if a part is missing or corrupt."""
        folder = Path(folder)
        if not (folder / "backbone").is_dir():  # which might else be looked for on the hub
            raise CheckpointError(
                f"{folder} is not a whole student: it has no backbone/. Give what `trace-sdk distill -o` wrote."
            )
        backbone = open_backbone(folder / "backbone")
        try:
            about = read_record(folder)
            weights = load((folder / "decoder.safetensors").read_bytes())
            decoder = EdgeDecoder(len(weights["standardise.weight"]))
            decoder.load_state_dict(weights)
            student = cls(backbone, decoder, blocks=about.get("blocks"), threshold=float(about["threshold"]))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ArgumentError) as error:
            raise CheckpointError(
                f"{folder} is not a whole student: {error}. Give the folder that `trace-sdk distill -o` wrote."
            ) from error
        return student.eval()


def features_of(attention: SelfAttention) -> Tensor:
    """What the decoder reads of one block: [B, 2·heads, H, W]."""
    return log_features(per_head_divergence_reference(attention, symmetric=True))
