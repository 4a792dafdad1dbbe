"""The graph that becomes an engine: uint8 RGB in, edge probability out, t = 0 folded into constants."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trace_sdk.student.folder import AnyStudent
from trace_sdk.student.model import Student


class EngineGraph(nn.Module):
    """`image` uint8 [B, H, W, 3] RGB → `edge_probability` float32 [B, H, W] in [0, 1].

    The student passed in is copied, not changed. Its weights may be rounded to fp16 first, so that storing them
    in fp16 loses nothing more.
    """

    def __init__(self, student: AnyStudent, *, half_weights: bool) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        fold_normalisation(self.student)
        if half_weights:
            for value in self.student.parameters():
                value.copy_(value.half().float())
        if isinstance(self.student, Student):
            fold_timestep_zero(self.student)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float() / 127.5 - 1
        if isinstance(self.student, Student):
            return self.student.logits(pixels, share_softmax=True).sigmoid()
        return self.student.logits(pixels).sigmoid()


class _Constant(nn.Module):
    """Stands where a layer was whose input no longer varies."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        value: Tensor = self.value  # type: ignore[assignment]
        return value


def fold_normalisation(model: nn.Module) -> None:
    """Make each convolution and the batch normalisation that follows it one convolution."""
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(layers) - 1):
            convolution, normalisation = layers[index], layers[index + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
                layers[index] = fuse_conv_bn_eval(convolution, normalisation)
                layers[index + 1] = nn.Identity()


def fold_timestep_zero(student: Student) -> None:
    """Replace each block's adaLN projection by what it gives at t = 0: a fifth of the weights go."""
    transformer = student.backbone.transformer
    zero = torch.zeros(1, device=next(transformer.parameters()).device)
    with torch.no_grad():
        embedding = transformer.time_text_embed(zero, zero.new_zeros(1, 64))  # [1, inner]
        for block in transformer.single_transformer_blocks:
            block.norm.linear = _Constant(block.norm.linear(block.norm.silu(embedding)))
