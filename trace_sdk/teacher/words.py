"""Where the image looks at the words of a prompt (paper's figure 1a): cross-attention stays semantic at every t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trace_sdk.backbones.latent import LatentBackbone
from trace_sdk.backbones.text_attention import TextAttention, attend_to_text
from trace_sdk.backbones.words import WordedPrompt
from trace_sdk.errors import ArgumentError
from trace_sdk.teacher.teacher import Teacher


@dataclass(frozen=True)
class WordMaps:
    """Heat maps of a prompt's words.

    Attributes:
        words: as they were asked for.
        timesteps: t of each step, in [0, 1).
        maps: float32 [timesteps, words, H, W] over the finest attention grid, in [0, 1]: which share of what an image
            token looks at among the text's tokens goes to the word's. Mean over heads and blocks, coarser grids
            upsampled; all words, special tokens and padding that the model sees would add up to 1.
    """

    words: tuple[str, ...]
    timesteps: tuple[float, ...]
    maps: NDArray[np.float32]


@torch.inference_mode()
def word_maps(
    teacher: Teacher,
    rgb: NDArray[np.uint8],
    prompt: WordedPrompt,
    words: Sequence[str] = (),
    timesteps: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8),
) -> WordMaps:
    """Read a prompt's words on one image, uint8 [H, W, 3] RGB, noised as the teacher noises it.

    The image is noised by the null prompt's trajectory and shown whole (`tile` does not count); the prompt takes part
    in the passes that are read.

    Args:
        prompt: of the same model, see `open_prompt`.
        words: words or phrases of the prompt; none means all of its words.

    Raises:
        ArgumentError: a word is not in the prompt, or the backbone takes no text.
    """
    backbone = teacher.backbone
    if not isinstance(backbone, LatentBackbone):
        raise ArgumentError(f"{backbone.family} takes no text, so there are no words to read.")
    asked = tuple(words) or prompt.words
    positions = [prompt.positions(word) for word in asked]
    clean = backbone.encode(teacher.prepare(rgb))
    grid = teacher.grid(clean)
    maps = []
    for t, x_t in teacher.trajectory(clean, teacher.noise_like(clean), tuple(timesteps)):
        blocks: list[Tensor] = []

        def add(attention: TextAttention, blocks: list[Tensor] = blocks) -> None:
            blocks.append(F.interpolate(shares(attention, positions), grid, mode="bilinear"))

        attend_to_text(backbone, prompt.embeddings, x_t, t, add)
        maps.append(torch.stack(blocks).mean(0)[0])
    return WordMaps(asked, tuple(timesteps), torch.stack(maps).cpu().numpy())


def shares(attention: TextAttention, positions: Sequence[Sequence[int]]) -> Tensor:
    """Of each word's tokens in one call: float32 [B, words, h, w], mean over heads."""
    summed: list[Tensor] = []
    query, key = attention.query.float() * attention.scale, attention.key.float()
    for head in range(query.shape[1]):  # one head's map at a time: text may be long
        scores = query[:, head] @ key[:, head].mT  # [B, N, T]
        if attention.bias is not None:
            scores = scores + attention.bias.expand(*query.shape[:3], key.shape[2])[:, head]
        share = scores.softmax(-1)
        summed.append(torch.stack([share[..., list(at)].sum(-1) for at in positions], 1))
    batch, words = query.shape[0], len(positions)
    return torch.stack(summed).mean(0).view(batch, words, *attention.grid)
