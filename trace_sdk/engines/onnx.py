"""Engine files on onnxruntime.

The graph: input `image` uint8 [batch, height, width, 3] RGB; output `edge_probability` [batch, height, width] of the
dtype that the manifest says. Everything else about it is in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from trace_sdk.engines.answers import checked, halved_once, joined
from trace_sdk.engines.binding import BoundSession
from trace_sdk.engines.cuda import device_number
from trace_sdk.engines.fork import lock_for_forks
from trace_sdk.engines.gpu_thread import GpuThread
from trace_sdk.engines.manifest import Manifest, verify_data, verify_seal
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.providers import CPU, Provider, Start, open_session, open_tensorrt
from trace_sdk.errors import DeviceError, EngineError
from trace_sdk.machine import usable_cpus

_ANSWERS = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}


class OnnxEngine:
    """One verified engine on one device. Safe to call from many threads: answers are made one after another.

    On a CPU the images of a batch run one by one: as fast there, a fraction of the memory, and each answer is
    bit for bit the one that the image gets alone. It also works in a fork, which waits for the answers under way.
    """

    engine_reason = "asked for"
    infer_photos = None

    def __init__(
        self,
        model: bytes,
        source: str,
        device: str = "auto",
        threads: int | None = None,
        *,
        tensorrt: bool = False,
        shapes: Callable[[Manifest], Collection[tuple[int, int]]] = lambda manifest: (),
    ) -> None:
        """Args: `model` the file's bytes, `source` its name for messages, the rest as in `open_engine`.

        With `tensorrt`, onnxruntime's TensorRT provider takes what it can and CUDA the rest. On CUDA each of `shapes`
        gets a CUDA graph; TensorRT's provider has one graph for all shapes, so it gets none.
        """
        number = device_number(device)
        self.threads = usable_cpus() if threads is None else threads
        self.sha256 = verify_seal(model, source)
        self.manifest = Manifest.from_metadata(read_metadata(model, source), source)
        known = shapes(self.manifest)
        self._source = source
        start = partial(_session, model, source, self.threads, verify_data(self.manifest, source))
        if self.manifest.precision == "bf16":
            start = partial(_not_on_a_cpu, start, source)
        if tensorrt:
            opened = open_tensorrt(start, device, number, self.manifest, self.sha256, known)
        else:
            opened = open_session(start, device, number, known)
        self._session, self.device, self.device_reason = opened.session, opened.device, opened.reason
        self.provider = self._session.get_providers()[0]
        _check_graph(self._session, self.manifest, source)
        on_cpu = self.provider == CPU
        self._bound = BoundSession(
            self._session,
            self.manifest.output,
            cuda=None if on_cpu else number,
            graphs=known if opened.graphs else (),
            fixed=opened.fixed,
            source=source,
        )
        self._gpu_thread = None if on_cpu else GpuThread(source)
        self._one_at_a_time = lock_for_forks()

    @property
    def memory(self) -> str:
        """Where inputs and answers lie."""
        return self._bound.memory

    @property
    def cuda_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return self._bound.captured

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        if self._gpu_thread is not None:
            return self._gpu_thread(partial(self._answer, batch))
        with self._one_at_a_time:
            return joined([self._answer(batch[i : i + 1]) for i in range(len(batch))])

    def _answer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        return joined(halved_once(self._run, batch, batch.shape[1:3], self._source, self.device))

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            answer = self._bound.run(batch)
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            raise EngineError(
                f"{self._source}: failed on {self.device} with input {batch.shape} ({_first_line(error)}). "
                "Try a smaller size, or another device."
            ) from error
        return checked(answer, batch, self._source, self.device)


def _not_on_a_cpu(
    start: Start, source: str, providers: list[Provider], *, sizes: Mapping[str, int] = MappingProxyType({})
) -> onnxruntime.InferenceSession:
    if providers == [CPU]:
        raise DeviceError(
            f"{source}: computes in bf16, which onnxruntime does not have on a CPU. It runs on a GPU (device='cuda', "
            "or runtime='tensorrt-rtx' or 'tensorrt'); for a CPU export the student with --precision fp16."
        )
    return start(providers, sizes=sizes)


def _session(
    model: bytes,
    source: str,
    threads: int,
    beside: Path | None,
    providers: list[Provider],
    *,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    for dimension, size in sizes.items():
        options.add_free_dimension_override_by_name(dimension, size)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if beside is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside.resolve()))
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
