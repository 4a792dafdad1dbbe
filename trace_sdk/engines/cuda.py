"""CUDA's runtime API from Python, for the engines on GPUs: pinned memory, copies, streams, graphs."""

from __future__ import annotations

import ctypes
import re
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trace_sdk.errors import ArgumentError, DeviceError, EngineError, MissingExtraError


def device_number(device: str) -> int:
    """That of the GPU in "cuda:N", else 0. Raises ArgumentError for what names no device."""
    match = re.fullmatch(r"cpu|auto|cuda(?::([0-9]+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ArgumentError(f"device={device!r} is not known. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    return int(match[1] or 0)


def load_cuda() -> Any:
    """CUDA's runtime API for Python. Raises MissingExtraError."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError:
        raise MissingExtraError(
            "Running on TensorRT needs CUDA's runtime API. Run: pip install cuda-bindings"
        ) from None


def gpu_name(number: int) -> str:
    """Name and compute capability of a GPU, such as "NVIDIA H100 80GB HBM3 (9.0)". Raises DeviceError."""
    cuda = load_cuda()
    error, about = cuda.cudaGetDeviceProperties(number)
    if int(error):
        raise DeviceError(f"cuda:{number} cannot be used ({_word(cuda, error)}). Check the driver (nvidia-smi).")
    name = about.name.decode() if isinstance(about.name, bytes) else about.name
    return f"{name.rstrip(chr(0))} ({about.major}.{about.minor})"


class Gpu:
    """One GPU, called for one engine: a call that fails is an EngineError that names both."""

    def __init__(self, number: int, source: str) -> None:
        self.api = load_cuda()
        self._number, self._source = number, source

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function of that name answers: nothing, a value, or a tuple of them."""
        error, *values = getattr(self.api, name)(*arguments)
        if int(error):
            raise EngineError(
                f"{self._source}: {name} failed on cuda:{self._number} ({_word(self.api, error)}). "
                "Try a smaller size or batch; after a device error, start the process again."
            )
        return values[0] if len(values) == 1 else tuple(values)

    def use(self) -> None:
        """Make it the current device; each thread has a current one of its own."""
        self.call("cudaSetDevice", self._number)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array in pinned host memory, not set; give it back with `unpin`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self.call("cudaHostAlloc", max(size, 1), self.api.cudaHostAllocDefault)
        buffer = (ctypes.c_uint8 * size).from_address(int(address))
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)

    def unpin(self, array: NDArray[Any]) -> None:
        """Free what `pinned` gave; nothing may look at it any more. Never raises: it runs at the very end, too."""
        self.api.cudaFreeHost(array.ctypes.data)


def _word(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
