"""Where a machine's numbers end: memory that is full, and half precision that overflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trace_sdk.backbones.backbone import Backbone
from trace_sdk.errors import ArgumentError, OutOfMemoryError
from trace_sdk.teacher.emergence import Emergence


@contextmanager
def memory_of(backbone: Backbone, size: int) -> Iterator[None]:
    """Turn torch's error for a full GPU into one that says what to lower; `size` of the image in px."""
    failure = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        failure = str(error).partition(".")[0]
    if failure is not None:
        # Outside of the except block, so that the traceback no longer holds the tensors.
        torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"{failure} ({backbone.family} at {size} px). Lower --batch or --size, read in windows (--tile), take the "
            "KL on fewer rows (--iep-rows 256), hold no N×N map (--form log-per-head), or open the backbone with "
            "--precision bf16 or --offload."
        )


def is_finite(emergence: Emergence | None, divergence: NDArray[np.float32]) -> bool:
    """Whether an image's curve and ABDiv were computed without overflow."""
    curve = emergence.kl if emergence else ()
    return bool(np.isfinite(divergence).all() and np.isfinite(curve).all())


@contextmanager
def in_fp32(backbone: Backbone) -> Iterator[None]:
    """The same weights in fp32 for a while; half precision is a part of fp32, so they come back as they were.

    Raises:
        ArgumentError: the weights are offloaded, and then have copies that would stay in half precision.
    """
    if getattr(backbone, "offloaded", False):
        raise ArgumentError(
            f"{backbone.family} overflows in {backbone.dtype}, and offloaded weights cannot change to fp32. Take "
            "--precision bf16, or fp32."
        )
    denoiser: Any = getattr(backbone, "denoiser", backbone)
    values = [value for value in (*denoiser.parameters(), *denoiser.buffers()) if value.is_floating_point()]
    dtypes = [value.dtype for value in values]  # a model may keep some of its layers in fp32
    for value in values:
        value.data = value.data.float()
    try:
        yield
    finally:
        for value, dtype in zip(values, dtypes, strict=True):
            value.data = value.data.to(dtype)
