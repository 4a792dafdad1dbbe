"""The attention layers whose head mean and ABDiv are measured, and their exact answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.kernels import head_mean_attention_reference, log_sum_exp, row_kl_reference
from trace_sdk.kernels.divergence import HORIZONTAL, opposite

EXACT_ELEMENTS = 1 << 27  # float64 scores held at a time for the exact answer: 1 GiB


@dataclass(frozen=True)
class Case:
    """One attention layer: tokens on a grid, heads, their width, and text tokens that a joint attention also reads."""

    name: str
    grid: tuple[int, int]
    heads: int
    width: int
    text: int = 0


CASES = {
    "cuda": (
        Case("SD1.5-512", (64, 64), 8, 40),
        Case("SDXL-1024", (64, 64), 10, 64),
        Case("PixArt-1024", (64, 64), 16, 72),
        Case("SD3.5-L-1024", (64, 64), 38, 64, text=333),
        Case("FLUX-1024", (64, 64), 24, 128, text=512),
        Case("SD1.5-1024", (128, 128), 8, 40),
    ),
    "cpu": (Case("SD1.5-512", (64, 64), 8, 40), Case("trace-small-512", (64, 64), 4, 64, text=1)),
}


@dataclass
class Inputs:
    """Queries and keys of the image, peaky as trained models' are, as views of the joint tensors."""

    query: Tensor
    key: Tensor
    joint: tuple[Tensor, Tensor, Tensor]
    attention: SelfAttention
    lse: Tensor

    @classmethod
    def of(cls, case: Case, device: str, seed: int = 0) -> Inputs:
        """Score deviation 3.6, smooth over neighbouring tokens, so that ABDiv is neither noise nor zero."""
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float16 if device == "cuda" else torch.float32
        tokens = case.text + case.grid[0] * case.grid[1]

        def draw() -> Tensor:
            coarse = torch.randn(case.heads * case.width, 1, case.grid[0] // 8, case.grid[1] // 8, generator=generator)
            image = F.interpolate(coarse, case.grid, mode="bicubic").flatten(2).view(case.heads, case.width, -1).mT
            text = torch.randn(case.heads, case.text, case.width, generator=generator)
            x = torch.cat([text, image / image.std()], 1)[None] * math.sqrt(3.6)
            # [B, tokens, heads, d] in memory, as models hold it
            return x.transpose(1, 2).contiguous().to(device, dtype).transpose(1, 2)

        joint = (draw(), draw(), draw())
        assert joint[0].shape[2] == tokens
        query, key = joint[0][:, :, case.text :], joint[1][:, :, case.text :]
        attention = SelfAttention(0, query, key, case.grid, case.width**-0.5)
        return cls(query, key, joint, attention, log_sum_exp(query, key))


def exact(x: Inputs) -> Tensor:
    """ABDiv in float64, by its definition, a few image rows and their neighbours at a time; where the inputs are."""
    a, (height, width) = x.attention, x.attention.grid
    query, key = (t.double() for t in (a.query, a.key))
    grid_query = torch.unflatten(query, 2, a.grid)
    at_once = max(1, EXACT_ELEMENTS // (query.shape[1] * width * key.shape[2]) - 2)
    strips = []
    for first in range(0, height, at_once):
        last = min(first + at_once, height)
        rows = torch.arange(first - 1, last + 1, device=query.device).clamp_(0, height - 1)
        log2_map = head_mean_attention_reference(grid_query[:, :, rows].flatten(2, 3), key, a.scale)
        image_rows = torch.unflatten(log2_map, 1, (len(rows), width))
        vertical = row_kl_reference(image_rows[:, 2:], image_rows[:, :-2])
        strips.append(vertical + row_kl_reference(*opposite(image_rows[:, 1:-1], HORIZONTAL)))
    return torch.cat(strips, 1)
