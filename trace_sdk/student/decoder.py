"""The edge decoder G_φ (paper 3.4): per-head divergence at t = 0 and a shallow image stem → edge logits.

The features say where instances part, on the backbone's grids of 8 px tokens or larger ones; the colour gradient says
exactly where the picture changes. The decoder answers with the gradient's log-odds plus what it has learnt to add:
untrained it is the colour gradient, and every step of training is spent on which of its edges are an instance's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_sdk.student.colour_gradient import ColourGradient
from trace_sdk.training.processes import SharedBatchNorm2d


class EdgeDecoder(nn.Module):
    """Features [B, C_k, H_k, W_k] of each block and image [B, 3, H, W] in [−1, 1] → edge logits [B, H, W].

    Features of coarser grids are enlarged to the finest, bilinearly. No layer takes statistics over the image, so a
    tile's answer depends only on what lies near it.

    Args:
        channels: ΣC_k.
    """

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.standardise = SharedBatchNorm2d(channels)
        self.tokens = nn.Sequential(nn.Conv2d(channels, width, 1), nn.SiLU(), _conv(width, width), _conv(width, width))
        self.gradient = ColourGradient()
        self.stem1 = _conv(4, 12)
        self.stem2 = _conv(12, 20, stride=2)
        self.stem4 = _conv(20, 32, stride=2)
        self.join4 = _conv(width + 32, 32)
        self.join2 = _conv(32 + 20, 20)
        self.join1 = _conv(20 + 12, 12)
        self.residual = nn.Conv2d(12, 1, 1)
        for value in self.residual.parameters():
            nn.init.zeros_(value)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        gradient = self.gradient(images)
        full = self.stem1(torch.cat([images, gradient], 1))
        half = self.stem2(full)
        quarter = self.stem4(half)
        finest = max((maps.shape[-2:] for maps in features), key=lambda grid: grid[0])
        x = self.tokens(self.standardise(torch.cat([_enlarge(maps, finest) for maps in features], 1)))
        x = self.join4(torch.cat([_enlarge(x, quarter.shape[-2:]), quarter], 1))
        x = self.join2(torch.cat([_double(x), half], 1))
        x = self.join1(torch.cat([_double(x), full], 1))
        logits: Tensor = gradient + self.residual(x)
        return logits.squeeze(1)

    @torch.no_grad()
    def raise_logits(self, by: float) -> None:
        """Add a constant to every answer."""
        self.residual.bias.add_(by)  # type: ignore[union-attr]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="replicate" if stride == 1 else "zeros"),
        nn.SiLU(),
    )


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
