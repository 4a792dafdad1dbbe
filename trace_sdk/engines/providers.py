"""onnxruntime's providers: which one a device gets, with what options, and what to say where it does not start."""

from __future__ import annotations

import ctypes
import io
import shutil
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeAlias

import onnxruntime

from trace_sdk.engines.cuda import gpu_name
from trace_sdk.engines.manifest import Manifest
from trace_sdk.errors import DeviceError, EngineError
from trace_sdk.machine import cache_folder
from trace_sdk.network_input import padded_length

Provider: TypeAlias = "str | tuple[str, dict[str, int | str]]"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_BATCH = 8  # the largest batch in the profile of a TensorRT engine

_CUDA_INSTALL = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
_TENSORRT_INSTALL = (
    f"It needs onnxruntime-gpu (pip uninstall -y onnxruntime && {_CUDA_INSTALL}) and "
    'TensorRT 10 (pip install "tensorrt-cu13==10.*" cuda-bindings); or use runtime="onnxruntime".'
)


class Start(Protocol):
    """Opens a session on providers; `sizes` are those of dimensions that will always be the same, by their names."""

    def __call__(
        self, providers: list[Provider], *, sizes: Mapping[str, int] = ...
    ) -> onnxruntime.InferenceSession: ...


class FixedSessions:
    """Sessions that can capture a CUDA graph, each for single images of one shape.

    A part of a model for any shape may have to ask which it is: that runs on the CPU, and no graph can hold it. For one
    shape onnxruntime makes constants of all that follows from it.
    """

    def __init__(self, start: Start, number: int, general: onnxruntime.InferenceSession) -> None:
        """`number` is the GPU's; `general` has the model for any shape."""
        self._start = start
        self._providers: list[Provider] = [(CUDA, cuda_options(number, graphs=True)), CPU]
        self._dimensions = general.get_inputs()[0].shape[:3]
        self._sessions: dict[tuple[int, int], onnxruntime.InferenceSession] = {}

    def __call__(self, shape: tuple[int, int]) -> onnxruntime.InferenceSession:
        """That of (height, width), opened when it is first asked for. Raises EngineError if it cannot capture."""
        if shape not in self._sessions:
            named = zip(self._dimensions, (1, *shape), strict=True)
            sizes = {name: size for name, size in named if isinstance(name, str)}
            self._sessions[shape] = self._start(self._providers, sizes=sizes)
        return self._sessions[shape]


@dataclass(frozen=True)
class Opened:
    """A session, the device it runs on, why there, and whether CUDA graphs can be captured: in it, or in `fixed`."""

    session: onnxruntime.InferenceSession
    device: str
    reason: str
    graphs: bool = False
    fixed: FixedSessions | None = None


def open_session(start: Start, device: str, number: int, shapes: Collection[tuple[int, int]]) -> Opened:
    """On the CPU or on CUDA; if `shapes`, (height, width), are known, CUDA graphs are worth it.

    Raises:
        DeviceError: CUDA was asked for and does not start.
        EngineError: onnxruntime cannot load the model.
    """
    if device == "cpu":
        return Opened(start([CPU]), "cpu", "asked for")
    if CUDA not in onnxruntime.get_available_providers():
        if device == "auto":
            return Opened(start([CPU]), "cpu", "auto: this onnxruntime has no CUDA")
        raise DeviceError(
            f"device={device!r}: this onnxruntime has no CUDA. Both packages own one folder, so swap them: "
            f"pip uninstall -y onnxruntime && {_CUDA_INSTALL}; or use device='cpu'."
        )
    load_libraries()
    session, without_graphs, trouble = None, "", "CUDA did not start"
    for capture in (True, False) if shapes else (False,):
        try:
            session = start([(CUDA, cuda_options(number, graphs=capture)), CPU])
            break
        except EngineError as error:  # with graphs: a part of this model runs on the CPU, or branches
            without_graphs, trouble = f", without CUDA graphs ({error})", str(error)
    if session is not None and session.get_providers()[0] == CUDA:
        reason = "auto: CUDA works" if device == "auto" else "asked for"
        if capture or not shapes:
            return Opened(session, f"cuda:{number}", reason, capture)
        fixed = FixedSessions(start, number, session)
        try:
            fixed(min(shapes))
        except EngineError:
            return Opened(session, f"cuda:{number}", reason + without_graphs)
        return Opened(session, f"cuda:{number}", f"{reason}, a session for each known shape", True, fixed)
    if device == "auto":
        return Opened(start([CPU]), "cpu", f"auto: {trouble}")
    if session is None:
        raise DeviceError(f"device={device!r} cannot be used: {trouble}")
    raise DeviceError(
        f"device={device!r}: onnxruntime has CUDA but could not start it. Check the driver (nvidia-smi) and "
        f"the CUDA libraries ({_CUDA_INSTALL}); or use device='cpu'."
    )


def open_tensorrt(
    start: Start, device: str, number: int, manifest: Manifest, sha256: str, shapes: Collection[tuple[int, int]]
) -> Opened:
    """On onnxruntime's TensorRT provider; what TensorRT cannot run goes to CUDA.

    Engines are built here and kept, for the sizes in `shapes`, or, where there are none, for every size of the
    manifest. Where the graph is cut into parts whose inputs those do not cover, TensorRT is left to the shapes that it
    meets; the reason says so.

    Raises:
        DeviceError: TensorRT or CUDA is not there, or does not start.
        EngineError: the model cannot be loaded.
    """
    if device == "cpu" or TENSORRT not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"runtime='onnxruntime-tensorrt' with device={device!r} is not possible here. {_TENSORRT_INSTALL}"
        )
    load_libraries()
    version = _tensorrt_version()
    if not version:
        raise DeviceError(
            f"onnxruntime has its TensorRT provider, but TensorRT's libraries are not here. {_TENSORRT_INSTALL}"
        )
    folder = tensorrt_cache(sha256, manifest.precision, version, gpu_name(number))
    others: list[Provider] = [(CUDA, cuda_options(number, graphs=False)), CPU]
    whole_range, reason = profile(manifest, shapes), "asked for"

    def started(ranges: dict[str, list[int]] | None) -> onnxruntime.InferenceSession:
        folder.mkdir(parents=True, exist_ok=True)
        return start([(TENSORRT, tensorrt_options(number, folder, sha256, ranges)), *others])

    kept = folder.is_dir() and any(folder.iterdir())
    try:
        session = started(whole_range)
    except EngineError as error:
        if "shape profiles" in str(error):
            session = started(None)
            reason = "asked for; built for each new shape, since TensorRT takes this graph in parts"
        elif kept:  # by a process that was killed while it wrote, perhaps: onnxruntime writes in place
            shutil.rmtree(folder)
            session = started(whole_range)
            reason = f"asked for; built again ({error})"
        else:
            raise
    if session.get_providers()[0] != TENSORRT:
        raise DeviceError(f"onnxruntime has TensorRT but could not start it. {_TENSORRT_INSTALL}")
    return Opened(session, f"cuda:{number}", reason)


def cuda_options(number: int, *, graphs: bool) -> dict[str, int | str]:
    """Options of onnxruntime's CUDA provider."""
    return {"device_id": number, **({"enable_cuda_graph": "1"} if graphs else {})}


def tensorrt_options(
    number: int, folder: Path, sha256: str, shapes: dict[str, list[int]] | None
) -> dict[str, int | str]:
    """Options of onnxruntime's TensorRT provider: its engines, their profiles and kernel timings are kept in `folder`.

    `shapes` are those of `image`, "min", "opt" and "max"; None leaves the profile to the shapes that are met.
    TensorRT keeps the precision of the file: no flag lowers it here, since that would change answers unseen.
    """
    ranges = {
        f"trt_profile_{name}_shapes": f"image:{'x'.join(map(str, shape))}" for name, shape in (shapes or {}).items()
    }
    return {
        "device_id": number,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": sha256[:16],
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        **ranges,
    }


def tensorrt_cache(sha256: str, precision: str, version: str, gpu: str) -> Path:
    """The folder for what TensorRT builds of an engine: another engine, precision, version or GPU has another."""
    words = [sha256[:16], precision, f"onnxruntime-{onnxruntime.__version__}", f"tensorrt-{version}", gpu]
    safe = ["".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in word) for word in words]
    return cache_folder() / "onnxruntime" / "_".join(safe)


def profile(manifest: Manifest, shapes: Collection[tuple[int, int]]) -> dict[str, list[int]]:
    """Smallest, usual and largest shape of `image`, [batch, height, width, 3]: of `shapes`, else of the manifest."""
    if shapes:
        heights, widths = zip(*shapes, strict=True)
        least, most = [min(heights), min(widths)], [max(heights), max(widths)]
        usual = most
    else:
        least, most = [manifest.min_size] * 2, [manifest.max_size] * 2
        usual = [padded_length(manifest.default_size, manifest.multiple_of, manifest.min_size)] * 2
    return {"min": [1, *least, 3], "opt": [1, *usual, 3], "max": [TENSORRT_BATCH, *most, 3]}


def load_libraries() -> None:
    """Load CUDA and cuDNN from pip's packages, which are on no library path; where there are none, nothing happens."""
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it does not find; CUDA then says that it cannot start
            onnxruntime.preload_dlls()


def _tensorrt_version() -> str:
    """Of the TensorRT that onnxruntime will find, "" if none. Importing pip's package loads its libraries."""
    try:
        return str(import_module("tensorrt").__version__)
    except ImportError:
        pass
    try:
        return str(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion())
    except OSError:
        return ""
