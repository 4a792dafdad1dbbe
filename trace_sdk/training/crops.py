"""How many crops of which size a training step takes."""

from __future__ import annotations

import torch

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError

PATCH, SMALLEST = PixelBackbone.multiple_of, PixelBackbone.min_size


def check_crops(sizes: tuple[int, ...], tokens: int, multiple_of: int = PATCH, min_size: int = SMALLEST) -> None:
    """Raise ArgumentError unless every size suits the backbone and fits into a step of `tokens`, 8×8 px each."""
    if not sizes or any(size % multiple_of or size < min_size for size in sizes):
        raise ArgumentError(
            f"Crop sizes of this backbone must be multiples of {multiple_of} from {min_size}, got {sizes} (--size)."
        )
    if tokens < (max(sizes) // PATCH) ** 2:
        raise ArgumentError(f"{tokens} tokens a step hold no crop of {max(sizes)} px; raise --tokens.")


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: the same whether or not the run was cut before it."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def draw_crops(sizes: tuple[int, ...], tokens: int, generator: torch.Generator) -> tuple[int, int]:
    """(count, size): one of `sizes` at random, and as many crops as `tokens` hold."""
    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    return tokens // (size // PATCH) ** 2, size
