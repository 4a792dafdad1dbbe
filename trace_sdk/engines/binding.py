"""A session of onnxruntime bound to buffers that stay where it computes: no allocation and no hidden copy an answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from trace_sdk.engines.cuda import Gpu
from trace_sdk.errors import MissingExtraError

KEPT = 8  # shapes whose buffers stay while others come; shapes with a captured graph stay for good
CAPTURED_BATCH = 8  # the largest batch that gets a graph of its own
_NO_GRAPH = -1  # onnxruntime's word for a run that is neither captured nor replayed; 0 is its own

Shape = tuple[int, ...]  # of `image`, [batch, height, width, 3]


@dataclass(frozen=True)
class _Bound:
    """Of one shape: arrays on the host, the session's own values (on a CPU the same memory), and how to run."""

    image: NDArray[np.uint8]
    edges: NDArray[Any]
    device_image: onnxruntime.OrtValue
    device_edges: onnxruntime.OrtValue
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions
    session: onnxruntime.InferenceSession


class BoundSession:
    """Runs a session on buffers that it keeps. Not for several threads at once."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        answer: DTypeLike,
        *,
        cuda: int | None = None,
        graphs: Collection[tuple[int, int]] = (),
        fixed: Callable[[tuple[int, int]], onnxruntime.InferenceSession] | None = None,
        source: str = "",
    ) -> None:
        """Args:
        answer: dtype of `edge_probability`.
        cuda: number of the GPU that the session computes on; None: a CPU.
        graphs: (height, width) of the inputs for which a CUDA graph is captured, one for each batch up to
            CAPTURED_BATCH; the session must have been opened for that.
        fixed: where it could not be: what gives the session for single images of one (height, width), which can.
        source: the engine's name for messages.
        """
        self._session, self._answer, self._cuda = session, np.dtype(answer), cuda
        self._graphs, self._fixed = frozenset(graphs), fixed
        self._numbers: dict[Shape, int] = {}
        self._next = count(1)
        self._bound: OrderedDict[Shape, _Bound] = OrderedDict()
        self._gpu: Gpu | None = None
        if cuda is not None:
            try:
                self._gpu = Gpu(cuda, source)
            except MissingExtraError:  # pageable memory then; `memory` says so
                self._gpu = None

    @property
    def memory(self) -> str:
        """Where inputs and outputs lie."""
        if self._cuda is None:
            return "host"
        if self._gpu is None:
            return "device, and pageable on the host (for pinned memory: pip install cuda-bindings)"
        return "device, and pinned on the host"

    @property
    def captured(self) -> int:
        """CUDA graphs captured so far."""
        return len(self._numbers)

    def run(self, batch: NDArray[np.uint8]) -> NDArray[Any]:
        """The answer to uint8 [B, H, W, 3], [B, H, W] of the dtype given; the caller's own copy."""
        try:
            return self._run(batch)
        except Exception:
            # What failed for want of memory must not keep any: the half of it comes next.
            self._drop(batch.shape)
            raise

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[Any]:
        if self._gpu is not None:
            self._gpu.use()
        bound = self._buffers(batch.shape)
        np.copyto(bound.image, batch)
        if self._cuda is None:
            bound.session.run_with_iobinding(bound.binding, bound.options)
            return bound.edges.copy()
        bound.device_image.update_inplace(bound.image)
        bound.session.run_with_iobinding(bound.binding, bound.options)
        if self._gpu is None:
            answer: NDArray[Any] = bound.device_edges.numpy()
            return answer
        self._gpu.call(
            "cudaMemcpy",
            bound.edges.ctypes.data,
            bound.device_edges.data_ptr(),
            bound.edges.nbytes,
            self._gpu.api.cudaMemcpyKind.cudaMemcpyDeviceToHost,
        )
        return bound.edges.copy()

    def _buffers(self, shape: Shape) -> _Bound:
        if shape in self._bound:
            self._bound.move_to_end(shape)
            return self._bound[shape]
        passing = [known for known in self._bound if known not in self._numbers]
        for oldest in passing[: max(len(passing) + 1 - KEPT, 0)]:
            self._drop(oldest)
        bound = self._bound[shape] = self._made(shape)
        return bound

    def _made(self, shape: Shape) -> _Bound:
        with ExitStack() as undo:  # of pinned memory, when there is not enough for the rest
            bound = self._bound_to(self._array(shape, np.uint8, undo), self._array(shape[:3], self._answer, undo))
            undo.pop_all()
        return bound

    def _bound_to(self, image: NDArray[np.uint8], edges: NDArray[Any]) -> _Bound:
        shape = image.shape
        if self._cuda is None:
            device_image, device_edges = (onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (image, edges))
        else:
            device_image, device_edges = (
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cuda", self._cuda)
                for array in (image, edges)
            )
        session, number = self._session, _NO_GRAPH
        if shape[1:3] in self._graphs and shape[0] <= (CAPTURED_BATCH if self._fixed is None else 1):
            number = self._numbers[shape] = next(self._next)
            if self._fixed is not None:
                session = self._fixed((shape[1], shape[2]))
        binding = session.io_binding()
        binding.bind_ortvalue_input("image", device_image)
        binding.bind_ortvalue_output("edge_probability", device_edges)
        options = onnxruntime.RunOptions()
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(number))
        return _Bound(image, edges, device_image, device_edges, binding, options, session)

    def _array(self, shape: Shape, dtype: DTypeLike, undo: ExitStack) -> NDArray[Any]:
        if self._gpu is None:
            return np.empty(shape, dtype)
        array = self._gpu.pinned(shape, dtype)
        undo.callback(self._gpu.unpin, array)
        return array

    def _drop(self, shape: Shape) -> None:
        self._numbers.pop(shape, None)
        bound = self._bound.pop(shape, None)
        if bound is not None and self._gpu is not None:
            self._gpu.unpin(bound.image)
            self._gpu.unpin(bound.edges)

    def __del__(self) -> None:
        for shape in list(getattr(self, "_bound", ())):
            self._drop(shape)
