"""Engine files on onnxruntime.

The graph: input `image` uint8 [batch, height, width, 3] RGB; output `edge_probability` [batch, height, width] of the
dtype that the manifest says. Everything else about it is in the manifest.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from trace_sdk.engines.answers import checked, halved_once
from trace_sdk.engines.manifest import Manifest, verify_seal
from trace_sdk.errors import ArgumentError, DeviceError, EngineError
from trace_sdk.machine import cache_folder, usable_cpus

Provider: TypeAlias = "str | tuple[str, dict[str, int | str]]"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_ANSWERS = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}


class OnnxEngine:
    """One verified engine on one device. Safe to call from many threads: answers are made one after another.

    On a CPU the images of a batch run one by one: as fast there, a fraction of the memory, and each answer is
    bit for bit the one that the image gets alone.
    """

    engine_reason = "asked for"

    def __init__(
        self, model: bytes, source: str, device: str = "auto", threads: int | None = None, *, tensorrt: bool = False
    ) -> None:
        """Args: `model` the file's bytes, `source` its name for messages, the rest as in `open_engine`.

        With `tensorrt`, onnxruntime's TensorRT provider takes what it can and CUDA the rest.
        """
        number = _device_number(device)
        self.threads = usable_cpus() if threads is None else threads
        self.sha256 = verify_seal(model, source)
        self._source = source
        start = partial(_session, model, source, self.threads)
        if tensorrt:
            self._session, self.device, self.device_reason = _open_tensorrt(start, device, number, self.sha256)
        else:
            self._session, self.device, self.device_reason = _open_session(start, device, number)
        self.provider = self._session.get_providers()[0]
        self.manifest = Manifest.from_metadata(self._session.get_modelmeta().custom_metadata_map, source)
        _check_graph(self._session, self.manifest, source)
        self._one_at_a_time = threading.Lock()

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        with self._one_at_a_time:
            if self.provider == CPU and len(batch) > 1:
                return np.concatenate([self._run(batch[i : i + 1]) for i in range(len(batch))])
            return halved_once(self._run, batch)

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            (answer,) = self._session.run(["edge_probability"], {"image": np.ascontiguousarray(batch)})
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            raise EngineError(
                f"{self._source}: failed on {self.device} with input {batch.shape} ({_first_line(error)}). "
                "Try a smaller size, or another device."
            ) from error
        return checked(answer, batch, self._source, self.device)


def _device_number(device: str) -> int:
    match = re.fullmatch(r"cpu|auto|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ArgumentError(f"device={device!r} is not known. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    return int(match[1] or 0)


def _open_session(
    start: Callable[[list[Provider]], onnxruntime.InferenceSession], device: str, number: int
) -> tuple[onnxruntime.InferenceSession, str, str]:
    """The session, the device it runs on, and why there."""
    available = onnxruntime.get_available_providers()
    if device == "cpu":
        return start([CPU]), "cpu", "asked for"
    if CUDA not in available:
        if device == "auto":
            return start([CPU]), "cpu", "auto: this onnxruntime has no CUDA"
        raise DeviceError(
            f"device={device!r}: this onnxruntime has no CUDA. Both packages own one folder, so swap them: "
            "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'; or use device='cpu'."
        )
    try:
        session = start([(CUDA, {"device_id": number}), CPU])
        first = session.get_providers()[0]
        reason = "CUDA did not start"
    except EngineError as error:
        if device != "auto":
            raise DeviceError(f"device={device!r} cannot be used: {error}") from error
        first, reason = "", str(error)
    if first == CUDA:
        return session, f"cuda:{number}", "auto: CUDA works" if device == "auto" else "asked for"
    if device == "auto":
        return start([CPU]), "cpu", f"auto: {reason}"
    raise DeviceError(
        f"device={device!r}: onnxruntime has CUDA but could not start it. Check the driver (nvidia-smi) and "
        "the CUDA libraries (pip install 'onnxruntime-gpu[cuda,cudnn]'); or use device='cpu'."
    )


def _open_tensorrt(
    start: Callable[[list[Provider]], onnxruntime.InferenceSession], device: str, number: int, sha256: str
) -> tuple[onnxruntime.InferenceSession, str, str]:
    install = (
        "It needs onnxruntime-gpu (pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]') and "
        "TensorRT 10 (pip install 'tensorrt-cu12==10.*'); or use runtime='onnxruntime'."
    )
    if device == "cpu" or TENSORRT not in onnxruntime.get_available_providers():
        raise DeviceError(f"runtime='onnxruntime-tensorrt' with device={device!r} is not possible here. {install}")
    cuda: Provider = (CUDA, {"device_id": number})
    session = start([(TENSORRT, tensorrt_options(number, sha256)), cuda, CPU])
    if session.get_providers()[0] != TENSORRT:
        raise DeviceError(f"onnxruntime has TensorRT but could not start it. {install}")
    return session, f"cuda:{number}", "asked for"


def tensorrt_options(number: int, sha256: str) -> dict[str, int | str]:
    """Options of onnxruntime's TensorRT provider: its engines, their shape profiles and kernel timings are kept.

    Profiles are the shapes that were met, so `EdgeDetector(buckets=…).warmup()` makes them, once for all processes.
    """
    folder = str(cache_folder() / "onnxruntime")
    return {
        "device_id": number,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": folder,
        "trt_engine_cache_prefix": sha256[:16],
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": folder,
    }


def _session(model: bytes, source: str, threads: int, providers: list[Provider]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        # Its own fallback would start, or go on, on the CPU with a line on stdout as the only sign.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=False)
    # onnxruntime's exceptions share no base class of their own.
    except Exception as error:
        raise EngineError(
            f"{source}: onnxruntime {onnxruntime.__version__} cannot load it ({_first_line(error)}). "
            "Update onnxruntime, or export the engine again."
        ) from error


def _check_graph(session: onnxruntime.InferenceSession, manifest: Manifest, source: str) -> None:
    ends = [*session.get_inputs(), *session.get_outputs()]
    said = [(value.name, value.type, len(value.shape)) for value in ends]
    if said != [("image", "tensor(uint8)", 4), ("edge_probability", _ANSWERS[manifest.output], 3)]:
        raise EngineError(f"{source}: its graph has other inputs and outputs: {said}. Export it again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
