"""The torch device that was asked for, or an error; never another one without a word."""

from __future__ import annotations

import torch
from torch import nn

from trace_sdk.errors import ArgumentError, DeviceError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Placed(nn.Module):
    """A module that says where and in what it computes: as its first weight."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype


def torch_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:N" as a device that is there.

    Raises:
        ArgumentError: another name.
        DeviceError: CUDA, or that GPU, is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device must be cpu, cuda or cuda:N; got {name!r}.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                "CUDA was asked for, but this torch sees no GPU. Install a CUDA build of torch on a machine with an "
                "NVIDIA driver, or use --device cpu."
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"{name} was asked for, but there are {torch.cuda.device_count()} GPUs (from cuda:0).")
    return device


def torch_dtype(precision: str) -> torch.dtype:
    """ "fp32", "bf16" or "fp16" as torch says it. Raises ArgumentError for another name."""
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    return PRECISIONS[precision]
