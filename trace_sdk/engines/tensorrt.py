"""Plans on TensorRT or TensorRT-RTX: pinned memory in and out, one stream. Not tried on a GPU yet; see tests/gpu."""

from __future__ import annotations

import ctypes
import threading
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.engines.answers import checked, halved_once
from trace_sdk.engines.plan import ANY_GPU, Built, unpack
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, MissingExtraError

# Runtime → modules that may hold it, and the line that installs it.
PACKAGES = {
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "pip install 'trace-sdk[tensorrt-rtx]'"),
    "tensorrt": (("tensorrt",), "pip install tensorrt"),
}


def load_package(runtime: str) -> Any:
    """The Python module of a runtime. Raises MissingExtraError with the line that installs it."""
    modules, line = PACKAGES[runtime]
    for name in modules:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise MissingExtraError(f"runtime={runtime!r} is not installed. Run: {line}")


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


def rebuild_line(source: str, built: Built) -> str:
    """How to build an engine file again."""
    return f"Build it again here: trace-sdk export ENGINE.onnx -o {source} --runtime {built.runtime}"


def check_built(built: Built, version: str, gpu: str, source: str) -> None:
    """Raises EngineError if a plan was built for another version of its runtime or another GPU than these."""
    of = f"(of the ONNX engine with sha256 {built.onnx_sha256[:12]}…, {built.precision})"
    if built.runtime_version != version:
        raise EngineError(
            f"{source}: was built for {built.runtime} {built.runtime_version} {of}, here is {version}. "
            f"{rebuild_line(source, built)}"
        )
    if built.gpu not in (ANY_GPU, gpu) and gpu:
        raise EngineError(f"{source}: was built for {built.gpu} {of}, here is {gpu}. {rebuild_line(source, built)}")


class TensorRTEngine:
    """One plan on one GPU. Safe to call from many threads: answers are made one after another."""

    engine_reason = "asked for"

    def __init__(self, data: bytes, source: str, device: str = "auto", *, reason: str = "asked for") -> None:
        """Args: `data` an engine file's bytes, `source` its name for messages, `device` "auto", "cuda" or "cuda:N"."""
        if device == "cpu":
            raise DeviceError(f"{source}: TensorRT runs on NVIDIA GPUs only. Use the ONNX engine with device='cpu'.")
        _, _, number = device.partition(":")
        if device.partition(":")[0] not in ("auto", "cuda") or not (number or "0").isdecimal():
            raise ArgumentError(f"device={device!r} is not known. Use 'auto', 'cuda' or 'cuda:N'.")
        self._number, self._source = int(number or 0), source
        self.manifest, self.built, plan, self.sha256 = unpack(data, source)
        package = load_package(self.built.runtime)
        check_built(self.built, package.__version__, "", source)
        self._cuda = load_cuda()
        gpu = gpu_name(self._number)
        check_built(self.built, package.__version__, gpu, source)
        self._call("cudaSetDevice", self._number)
        self._runtime = package.Runtime(package.Logger(package.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{source}: does not load on {gpu}. {rebuild_line(source, self.built)}")
        self._context = self._engine.create_execution_context()
        (self._stream,) = self._call("cudaStreamCreate")
        self._buffers: dict[str, tuple[int, int, NDArray[np.uint8]]] = {}
        self._one_at_a_time = threading.Lock()
        self.device, self.device_reason = f"cuda:{self._number}", reason
        self.provider, self.threads = f"{self.built.runtime} {self.built.runtime_version}", 1

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        most = self.built.profile["max"][0]
        with self._one_at_a_time:
            parts = [batch[start : start + most] for start in range(0, len(batch), most)]
            answers = [halved_once(self._run, part) for part in parts]
        return checked(np.concatenate(answers), batch, self._source, self.device)

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        kinds = self._cuda.cudaMemcpyKind
        self._call("cudaSetDevice", self._number)  # each thread has a device of its own
        count = int(np.prod(batch.shape[:3]))
        image, pinned_image = self._buffer("image", batch.nbytes)
        edges, pinned_edges = self._buffer("edge_probability", 4 * count)
        pinned_image[:] = np.ascontiguousarray(batch).reshape(-1)
        self._call(
            "cudaMemcpyAsync", image, pinned_image.ctypes.data, batch.nbytes, kinds.cudaMemcpyHostToDevice, self._stream
        )
        ready = self._context.set_input_shape("image", tuple(batch.shape))
        self._context.set_tensor_address("image", image)
        self._context.set_tensor_address("edge_probability", edges)
        if not (ready and self._context.execute_async_v3(int(self._stream))):
            raise EngineError(
                f"{self._source}: {self.provider} failed with input {batch.shape}; it was built for "
                f"{self.built.profile}. {rebuild_line(self._source, self.built)}"
            )
        self._call(
            "cudaMemcpyAsync", pinned_edges.ctypes.data, edges, 4 * count, kinds.cudaMemcpyDeviceToHost, self._stream
        )
        self._call("cudaStreamSynchronize", self._stream)
        return pinned_edges.view(np.float32).reshape(batch.shape[:3]).copy()

    def _buffer(self, name: str, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Device address and pinned array of that many bytes; they grow, and stay for the next answer."""
        device, capacity, pinned = self._buffers.get(name, (0, 0, np.empty(0, np.uint8)))
        if capacity < size:
            if capacity:
                self._call("cudaFree", device)
                self._call("cudaFreeHost", pinned.ctypes.data)
                del self._buffers[name]
            (device,) = self._call("cudaMalloc", size)
            (address,) = self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault)
            pinned = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
            self._buffers[name] = (device, size, pinned)
        return device, pinned[:size]

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            raise EngineError(
                f"{self._source}: {name} failed on cuda:{self._number} ({_word(self._cuda, error)}). "
                "Try a smaller size or batch; after a device error, start the process again."
            )
        return list(values)

    def __del__(self) -> None:
        for device, _, pinned in getattr(self, "_buffers", {}).values():
            self._cuda.cudaFree(device)
            self._cuda.cudaFreeHost(pinned.ctypes.data)


def _word(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
