"""Which kernels run: Triton's on CUDA, a few rows at a time in torch on a CPU, and an error anywhere else."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from trace_sdk.errors import DeviceError, MissingExtraError


def check_device(x: Tensor) -> None:
    """Raise DeviceError for a device without kernels, MissingExtraError for CUDA without Triton."""
    if x.device.type == "cuda" and find_spec("triton") is None:
        raise MissingExtraError('The kernels on CUDA need Triton: pip install "trace-sdk[kernels]".')
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"There are kernels for cpu and cuda, not for {x.device.type}. Move the tensors to one.")


def runs_triton(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels: on CUDA, and on a CPU where TRITON_INTERPRET=1 asks for it.

    They compute in float32, so float64, which only a CPU takes, stays with torch.
    """
    return x.is_cuda or (os.environ.get("TRITON_INTERPRET") == "1" and x.dtype != torch.float64)
