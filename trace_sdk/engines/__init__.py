"""Engines: one file each, behind one protocol, checked before they run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trace_sdk.backbones.checkpoint import PICKLE_NAMES, is_pickle
from trace_sdk.engines.cuda import device_number
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.plan import MAGIC
from trace_sdk.engines.tensorrt import PACKAGES
from trace_sdk.errors import ArgumentError, DeviceError, EngineError
from trace_sdk.student.record import is_student

ON_CPU, ON_GPU = "trace-nano", "trace-small"  # what is opened where no engine is named
BUNDLED = (ON_CPU, ON_GPU)
Shapes: TypeAlias = Callable[[Manifest], Collection[tuple[int, int]]]  # see `open_engine`
# Photos uint8 [H, W, 3] of any sizes, and `size` and `padded` of `trace_sdk.network_input.fit`, which make one shape of
# them all → the edge probability of each, float32 [H, W].
InferPhotos: TypeAlias = Callable[[Sequence[NDArray[np.uint8]], int, Callable[[int], int]], list[NDArray[np.float32]]]
RUNTIMES = ("onnxruntime", "onnxruntime-tensorrt", *PACKAGES, "torch", "torch.compile")


@runtime_checkable
class Engine(Protocol):
    """A network that turns pictures into edge probabilities.

    Attributes:
        manifest: what the engine says about itself.
        sha256: of the engine file, hexadecimal.
        engine_reason: why this engine was taken.
        device: where it runs, "cpu" or "cuda:0".
        device_reason: why it runs there.
        provider: the runtime's own name for that.
        threads: CPU threads that work on one picture.
        memory: where inputs and answers lie.
        cuda_graphs: how many were captured so far.
    """

    manifest: Manifest
    sha256: str
    engine_reason: str
    device: str
    device_reason: str
    provider: str
    threads: int

    @property
    def memory(self) -> str: ...

    @property
    def cuda_graphs(self) -> int: ...

    @property
    def infer_photos(self) -> InferPhotos | None:
        """As `fit`, `infer` and `unfit` of `trace_sdk.network_input`, all on the device; None: it only infers."""
        ...

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Edge probability of RGB pictures: uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1].

        H and W are multiples of `manifest.multiple_of`, at least `min_size` and at most `max_size`; any where
        `manifest.input` is "any size".

        Raises:
            EngineError: the network failed, or its answer has a wrong shape, NaN or leaves [0, 1].
        """
        ...


def open_engine(
    engine: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    runtime: str = "auto",
    shapes: Shapes = lambda manifest: (),
) -> Engine:
    """Open an engine file, or one that comes with the package, on a device.

    Args:
        engine: path of an `.onnx` file, a bundled name, or None: "trace-nano" on a CPU, "trace-small" on a GPU.
        device: "cpu", "cuda", "cuda:N" or "auto" (CUDA where it works, else CPU).
        threads: CPU threads that work on one picture; None: the cores that this process may use.
        runtime: "auto" by what the file is, or one of RUNTIMES.
        shapes: given the manifest, (height, width) of every input there will be, for runtimes that prepare themselves
            for known shapes; none: any. Called before the engine is loaded, so it may refuse.

    Raises:
        EngineError: missing, corrupt, pickled or foreign.
        DeviceError: the device is not there.
        ArgumentError: no such device or runtime, or the runtime cannot open such a file.
        MissingExtraError: the runtime is not installed.
    """
    if runtime not in ("auto", *RUNTIMES):
        raise ArgumentError(f"runtime={runtime!r} is not one of auto, {', '.join(RUNTIMES)}.")
    if engine is None:
        return _open_default(device, threads, runtime, shapes)
    folder = Path(engine)
    if is_student(folder):
        if runtime not in ("auto", "torch", "torch.compile"):
            raise ArgumentError(
                f"{folder} is a student, which {runtime} cannot run. Export it, or use runtime='torch'."
            )
        from trace_sdk.engines.torch import TorchEngine

        return TorchEngine(folder, device, threads, compiled=runtime == "torch.compile", shapes=shapes)
    number = device_number(device)
    model, source = read_engine(engine)
    built = model.startswith(MAGIC)
    if runtime.startswith("torch") or (built and runtime not in ("auto", *PACKAGES)):
        raise ArgumentError(f"{source} cannot be run by {runtime}. Leave runtime out.")
    if built or runtime in PACKAGES:
        from trace_sdk.engines.tensorrt import TensorRTEngine

        reason = "asked for"
        if not built:
            if device == "cpu":
                raise DeviceError(f"{runtime} runs on NVIDIA GPUs only. Use runtime='onnxruntime' with device='cpu'.")
            from trace_sdk.export.tensorrt import build_once

            model, reason = build_once(model, source, runtime, device=number)
        return TensorRTEngine(model, source, device, reason=reason, shapes=shapes)
    from trace_sdk.engines.onnx import OnnxEngine

    on_tensorrt = runtime == "onnxruntime-tensorrt"
    opened = OnnxEngine(model, source, device, threads, tensorrt=on_tensorrt, shapes=shapes)
    if source in BUNDLED and opened.manifest.name != source:
        raise EngineError(
            f"The file of the bundled engine {source} holds {opened.manifest.name}. Install trace-sdk again."
        )
    return opened


def default_engine(device: str) -> tuple[str, str]:
    """The bundled engine that suits a device, and why.

    With "auto" a GPU counts as there when onnxruntime was built for one; `open_engine` then tries it.
    """
    import onnxruntime

    if device == "auto" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ON_CPU, "none was named, and this onnxruntime has no CUDA: the engine for CPUs"
    if device == "cpu":
        return ON_CPU, "none was named: the engine for CPUs"
    return ON_GPU, "none was named: the engine for GPUs"


def _open_default(device: str, threads: int | None, runtime: str, shapes: Shapes) -> Engine:
    name, reason = default_engine(device)
    opened = open_engine(name, device, threads, runtime, shapes)
    if name == ON_GPU and opened.device == "cpu":
        opened = open_engine(ON_CPU, device, threads, runtime, shapes)
        reason = "none was named, and CUDA did not start: the engine for CPUs"
    opened.engine_reason = reason
    return opened


def read_engine(engine: str | os.PathLike[str]) -> tuple[bytes, str]:
    """The bytes of an engine file, not verified yet, and the name to call it by in messages.

    Raises:
        EngineError: missing, unreadable, a pickle, or a student that is not exported yet.
    """
    name = os.fspath(engine)
    if name in BUNDLED:
        return _read_bundled(name), name
    path = Path(name)
    if is_student(path):
        raise EngineError(f"{path} is a student, not an engine yet. Run: trace-sdk export {path} -o {path.name}.onnx")
    try:
        if path.is_dir():
            raise EngineError(
                f"{path} is a folder, and no student: it has no student.json. Give the folder of a student, or an "
                "engine that `trace-sdk export` made of one."
            )
        if not path.exists():
            raise EngineError(_missing(name))
        if not path.is_file():
            raise EngineError(f"{path} is not a regular file. Give the path of an .onnx engine.")
        model = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}. Check its name and permissions.") from error
    _refuse_foreign(model[:16], path)
    return model, str(path)


def _read_bundled(name: str) -> bytes:
    resource = files("trace_sdk.engines.bundled") / f"{name}.onnx"
    try:
        return resource.read_bytes()
    except OSError as error:
        raise EngineError(
            f"The bundled engine {name} is not in this installation ({error.strerror}). Install trace-sdk "
            "again, or give the path of an .onnx engine."
        ) from error


def _missing(name: str) -> str:
    bundled = f"Bundled engines: {', '.join(BUNDLED)}."
    if Path(name).suffix or os.sep in name:
        return f"{name}: no such engine file. Check the path, or use a bundled engine by name. {bundled}"
    near = difflib.get_close_matches(name, BUNDLED, n=1)
    return f"No engine is called {name!r}.{f' Did you mean {near[0]!r}?' if near else ''} {bundled}"


def _refuse_foreign(head: bytes, path: Path) -> None:
    if not head:
        raise EngineError(f"{path}: is empty (0 bytes). Download or export the engine again.")
    if path.suffix in PICKLE_NAMES or is_pickle(head):
        raise EngineError(
            f"{path}: is a pickled checkpoint, which can run any code when loaded, so it is refused. "
            "Give an .onnx engine; make one of a student folder with `trace-sdk export`."
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        raise EngineError(f"{path}: holds weights without a graph. Run `trace-sdk export` on its student folder first.")
