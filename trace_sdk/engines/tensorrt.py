"""Plans on TensorRT or TensorRT-RTX: pinned memory in and out, one stream, a CUDA graph for each known shape.

Not tried on a GPU yet; see tests/gpu.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trace_sdk.engines.answers import checked, halved_once, joined
from trace_sdk.engines.cuda import Gpu, device_number, gpu_name
from trace_sdk.engines.gpu_thread import GpuThread
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.plan import ANY_GPU, Built, unpack
from trace_sdk.errors import DeviceError, EngineError, MissingExtraError

# Runtime → modules that may hold it, and the line that installs it.
PACKAGES = {
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), 'pip install "trace-sdk[tensorrt-rtx]"'),
    "tensorrt": (("tensorrt",), "pip install tensorrt cuda-bindings"),
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


KEPT = 4  # shapes whose buffers stay while others come; known shapes stay for good


class TensorRTEngine:
    """One plan on one GPU. Safe to call from many threads: answers are made one after another, in one of its own."""

    engine_reason = "asked for"
    infer_photos = None
    memory = "device, and pinned on the host"

    def __init__(
        self,
        data: bytes,
        source: str,
        device: str = "auto",
        *,
        reason: str = "asked for",
        shapes: Callable[[Manifest], Collection[tuple[int, int]]] = lambda manifest: (),
    ) -> None:
        """Args: `data` an engine file's bytes, `source` its name for messages, `device` "auto", "cuda" or "cuda:N".

        Each of `shapes` gets a CUDA graph when it is first met.
        """
        if device == "cpu":
            raise DeviceError(f"{source}: TensorRT runs on NVIDIA GPUs only. Use the ONNX engine with device='cpu'.")
        self._number, self._source = device_number(device), source
        self.manifest, self.built, plan, self.sha256 = unpack(data, source)
        self._known = frozenset(shapes(self.manifest))
        package = load_package(self.built.runtime)
        check_built(self.built, package.__version__, "", source)
        self._gpu = Gpu(self._number, source)
        gpu = gpu_name(self._number)
        check_built(self.built, package.__version__, gpu, source)
        self._thread = GpuThread(source)
        self._slots: OrderedDict[tuple[int, ...], _Slot] = OrderedDict()
        self._thread(partial(self._load, package, plan, gpu))
        self.device, self.device_reason = f"cuda:{self._number}", reason
        self.provider, self.threads = f"{self.built.runtime} {self.built.runtime_version}", 1

    @property
    def cuda_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return sum(slot.graph is not None for slot in self._slots.values())

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        return checked(self._thread(partial(self._answer, batch)), batch, self._source, self.device)

    def _load(self, package: Any, plan: bytes, gpu: str) -> None:
        self._gpu.use()
        self._runtime = package.Runtime(package.Logger(package.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{self._source}: does not load on {gpu}. {rebuild_line(self._source, self.built)}")
        self._package = package
        self._context = self._new_context()
        self._stream = self._gpu.call("cudaStreamCreate")

    def _new_context(self) -> Any:
        if not hasattr(self._package, "DynamicShapesKernelSpecializationStrategy"):
            return self._engine.create_execution_context()
        # TensorRT-RTX would otherwise go on looking for better kernels, which a captured graph never gets.
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._package.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return self._engine.create_execution_context(config)

    def _answer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        most = self.built.profile["max"][0]
        parts = [batch[start : start + most] for start in range(0, len(batch), most)]
        return joined(
            [
                answer
                for part in parts
                for answer in halved_once(self._run, part, part.shape[1:3], self._source, self.device)
            ]
        )

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            slot = self._slot(batch.shape)
            np.copyto(slot.image, batch)
            if slot.graph is not None:
                self._gpu.call("cudaGraphLaunch", slot.graph, self._stream)
            else:
                self._enqueue(slot)
            self._gpu.call("cudaStreamSynchronize", self._stream)
            answer: NDArray[np.float32] = slot.edges.copy()
            if slot.graph is None and batch.shape[1:3] in self._known:
                self._capture(slot)
        except EngineError:
            # What failed for want of memory must not keep any: the half of it comes next.
            self._drop(batch.shape)
            raise
        return answer

    def _enqueue(self, slot: _Slot) -> None:
        """Put upload, network and download on the stream."""
        kinds = self._gpu.api.cudaMemcpyKind
        copy = partial(self._gpu.call, "cudaMemcpyAsync")
        up, down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        copy(slot.device_image, slot.image.ctypes.data, slot.image.nbytes, up, self._stream)
        ready = slot.context.set_input_shape("image", slot.image.shape)
        slot.context.set_tensor_address("image", slot.device_image)
        slot.context.set_tensor_address("edge_probability", slot.device_edges)
        if not (ready and slot.context.execute_async_v3(int(self._stream))):
            raise EngineError(
                f"{self._source}: {self.provider} failed with input {slot.image.shape}; it was built for "
                f"{self.built.profile}. {rebuild_line(self._source, self.built)}"
            )
        copy(slot.edges.ctypes.data, slot.device_edges, slot.edges.nbytes, down, self._stream)

    def _capture(self, slot: _Slot) -> None:
        """Give a slot its graph; a shape that cannot have one is no longer known, and answers without."""
        try:
            slot.graph = self._captured(slot)
        except EngineError as error:
            height, width = slot.image.shape[1:3]
            self._known -= {(height, width)}
            self.device_reason += f"; {width}x{height} without a CUDA graph ({error})"

    def _captured(self, slot: _Slot) -> Any:
        """The CUDA graph of an answer: upload, network, download. A shape has to have been run before."""
        mode = self._gpu.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._gpu.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            self._enqueue(slot)
        finally:  # a stream left capturing could do nothing else
            graph = self._gpu.call("cudaStreamEndCapture", self._stream)
        try:
            return self._gpu.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._gpu.call("cudaGraphDestroy", graph)

    def _slot(self, shape: tuple[int, ...]) -> _Slot:
        if shape in self._slots:
            self._slots.move_to_end(shape)
            return self._slots[shape]
        passing = [other for other in self._slots if other[1:3] not in self._known]
        for oldest in passing[: max(len(passing) + 1 - KEPT, 0)]:
            self._drop(oldest)
        # A captured graph holds what its context held, so a known shape has a context to itself.
        context = self._new_context() if shape[1:3] in self._known else self._context
        slot = self._slots[shape] = _Slot(self._gpu, context, shape)
        return slot

    def _drop(self, shape: tuple[int, ...]) -> None:
        slot = self._slots.pop(shape, None)
        if slot is not None:
            slot.free()

    def __del__(self) -> None:
        for shape in list(getattr(self, "_slots", ())):
            self._drop(shape)


class _Slot:
    """What one shape needs: buffers on both sides whose addresses stay, a context, and its graph once captured."""

    def __init__(self, gpu: Gpu, context: Any, shape: tuple[int, ...]) -> None:
        self._gpu, self.context, self.graph = gpu, context, None
        self._on_host: list[NDArray[Any]] = []
        self._on_device: list[Any] = []
        try:
            self.image, self.device_image = self._pair(shape, np.uint8)
            self.edges, self.device_edges = self._pair(shape[:3], np.float32)
        except EngineError:
            self.free()
            raise

    def _pair(self, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[NDArray[Any], Any]:
        """A pinned array and the address of as much device memory."""
        self._on_host.append(self._gpu.pinned(shape, dtype))
        self._on_device.append(self._gpu.call("cudaMalloc", self._on_host[-1].nbytes))
        return self._on_host[-1], self._on_device[-1]

    def free(self) -> None:
        """Never raises: it runs while things are torn down."""
        if self.graph is not None:
            self._gpu.api.cudaGraphExecDestroy(self.graph)
        for address in self._on_device:
            self._gpu.api.cudaFree(address)
        for array in self._on_host:
            self._gpu.unpin(array)
