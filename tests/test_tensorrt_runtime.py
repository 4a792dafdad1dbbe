"""Plans run on a made-up GPU: memory is a set of blocks, a stream works at once, a captured graph is a list of work.

It knows the rules that matter: what is not allocated cannot be copied, a capture does nothing until it is launched, a
graph holds the addresses that it was captured with, memory runs out.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trace_sdk.engines import cuda, tensorrt
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.plan import Built, pack
from trace_sdk.engines.tensorrt import KEPT, TensorRTEngine
from trace_sdk.errors import EngineError, OutOfMemoryError

MakeEngine = Callable[..., bytes]
NO_MEMORY, WRONG = 2, 1


class FakeCuda:
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.room, self.launched, self.graphs = 1 << 30, 0, 0
        self.recording: list[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaGetDeviceProperties(self, number: int) -> Any:
        return 0, SimpleNamespace(name=b"Fake", major=9, minor=0)

    def cudaGetErrorString(self, error: int) -> Any:
        return 0, b"out of memory" if error == NO_MEMORY else b"invalid argument"

    def cudaSetDevice(self, number: int) -> Any:
        return (0,)

    def cudaStreamCreate(self) -> Any:
        return 0, 77

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (0,)

    def taken(self, blocks: dict[int, Any], size: int) -> Any:
        if self.recording is not None:
            return (WRONG,)  # as on a real stream
        if sum(map(len, self.device.values())) + size > self.room:
            return (NO_MEMORY,)
        block = ctypes.create_string_buffer(size)
        blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaMalloc(self, size: int) -> Any:
        return self.taken(self.device, size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.taken(self.host, size)

    def cudaFree(self, address: int) -> Any:
        del self.device[address]
        return (0,)

    def cudaFreeHost(self, address: int) -> Any:
        del self.host[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> Any:
        targets, sources = (self.device, self.host) if kind == 1 else (self.host, self.device)

        def work() -> None:
            assert len(targets[to]) >= size and len(sources[source]) >= size
            ctypes.memmove(to, source, size)

        self.do(work)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        recorded, self.recording = self.recording, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.graphs += 1
        return 0, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        graph.clear()
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> Any:
        self.graphs -= 1
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> Any:
        self.launched += 1
        for work in graph:
            work()
        return (0,)


class FakeContext:
    """Its network: the mean of R, G and B."""

    def __init__(self, gpu: FakeCuda, counts: list[tuple[int, ...]]) -> None:
        self.gpu, self.counts, self.addresses = gpu, counts, dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[1] != 999

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        shape, (image, edges) = self.shape, (self.addresses[name] for name in ("image", "edge_probability"))
        self.counts.append(shape)

        def work() -> None:
            count = int(np.prod(shape))
            pixels = np.frombuffer(self.gpu.device[image], np.uint8, count).reshape(shape)
            answer = pixels.mean(-1, dtype=np.float32) / np.float32(255)
            ctypes.memmove(edges, answer.tobytes(), len(self.gpu.device[edges]))

        self.gpu.do(work)
        return True


def expected(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    answer: NDArray[np.float32] = batch.mean(-1, dtype=np.float32) / np.float32(255)
    return answer


def pictures(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "load_cuda", lambda: fake)
    return fake


@pytest.fixture
def executed() -> list[tuple[int, ...]]:
    """The shape of each time that the network was put on a stream."""
    return []


@pytest.fixture
def opened(
    gpu: FakeCuda, executed: list[tuple[int, ...]], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TensorRTEngine]:
    plan = SimpleNamespace(create_execution_context=lambda *_: FakeContext(gpu, executed))
    package = SimpleNamespace(
        __version__="10.9",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: plan),
    )
    monkeypatch.setattr(tensorrt, "load_package", lambda runtime: package)
    manifest = Manifest.from_metadata(read_metadata(make_engine(), "tiny"), "tiny")
    built = Built("tensorrt", "10.9", "Fake (9.0)", "fp16", {"max": [4, 1024, 1024, 3]}, "ab" * 32)

    def make(*shapes: tuple[int, int]) -> TensorRTEngine:
        return TensorRTEngine(pack(manifest, built, b"plan"), "e.engine", "cuda:0", shapes=lambda manifest: shapes)

    return make


def test_answers(opened: Callable[..., TensorRTEngine]) -> None:
    engine = opened()
    for seed, shape in enumerate([(1, 16, 24), (3, 24, 16), (11, 16, 16), (1, 16, 24)]):
        batch = pictures(*shape, seed=seed)[:, ::-1]
        np.testing.assert_array_equal(engine.infer(batch), expected(batch))
    assert engine.cuda_graphs == 0 and engine.memory == "device, and pinned on the host"


def test_a_known_shape_is_captured_once_and_then_only_launched(
    opened: Callable[..., TensorRTEngine], gpu: FakeCuda, executed: list[tuple[int, ...]]
) -> None:
    engine = opened((16, 24), (24, 16))
    for seed in range(5):
        for shape in [(1, 16, 24), (1, 24, 16), (2, 16, 24)]:
            batch = pictures(*shape, seed=seed)
            np.testing.assert_array_equal(engine.infer(batch), expected(batch))
    assert sorted(executed) == sorted([(1, 16, 24, 3), (1, 24, 16, 3), (2, 16, 24, 3)] * 2), "run, then captured"
    assert engine.cuda_graphs == gpu.graphs == 3 and gpu.launched == 3 * 4
    engine.infer(pictures(1, 32, 32))
    assert engine.cuda_graphs == 3, "not a known shape"


def test_buffers_of_passing_shapes_are_given_back(opened: Callable[..., TensorRTEngine], gpu: FakeCuda) -> None:
    engine = opened((16, 24))
    for side in range(16, 16 + 8 * 3 * KEPT, 8):
        engine.infer(pictures(1, 16, 24))
        engine.infer(pictures(1, side, 16))
    assert len(gpu.device) == len(gpu.host) == 2 * (KEPT + 1)
    del engine
    gc.collect()
    assert not gpu.device and not gpu.host and gpu.graphs == 0


def test_out_of_memory_halves_once_then_says_what_to_lower(
    opened: Callable[..., TensorRTEngine], gpu: FakeCuda
) -> None:
    engine, batch = opened((64, 64)), pictures(4, 64, 64)
    alone = 64 * 64 * (3 + 4)
    gpu.room = 2 * alone
    np.testing.assert_array_equal(engine.infer(batch), expected(batch))
    assert {shape[0] for shape in engine._slots} == {2}
    other = opened()
    gpu.room = 3 * alone  # one of them is free
    with pytest.raises(
        OutOfMemoryError, match=r"e.engine: the memory of cuda:0 is too small. Use a smaller batch \(here 4"
    ):
        other.infer(batch)
    assert not other._slots, "nothing is kept of what failed"
    np.testing.assert_array_equal(other.infer(batch[:1]), expected(batch[:1]))


def test_a_network_that_fails_leaves_the_next_answer_alone(opened: Callable[..., TensorRTEngine]) -> None:
    engine = opened((999, 16), (16, 24))
    with pytest.raises(
        EngineError, match=r"failed with input \(1, 999, 16, 3\); it was built for.*Build it again here"
    ):
        engine.infer(pictures(1, 999, 16))
    batch = pictures(1, 16, 24)
    np.testing.assert_array_equal(engine.infer(batch), expected(batch))


def test_a_shape_that_cannot_be_captured_is_answered_without_a_graph(
    opened: Callable[..., TensorRTEngine], gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, batch = opened((16, 24), (24, 16)), pictures(1, 16, 24)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "cudaGraphInstantiate", lambda graph, flags: (WRONG, None))
        np.testing.assert_array_equal(engine.infer(batch), expected(batch))
    assert "24x16 without a CUDA graph (e.engine: cudaGraphInstantiate failed" in engine.device_reason
    np.testing.assert_array_equal(engine.infer(batch), expected(batch))
    engine.infer(pictures(1, 24, 16))
    assert engine.cuda_graphs == 1 and engine.device_reason.count("without") == 1


def test_64_threads_get_the_serial_answers(opened: Callable[..., TensorRTEngine]) -> None:
    engine = opened((16, 24), (24, 16))
    batches = [pictures(1 + seed % 2, *((16, 24), (24, 16), (32, 16))[seed % 3], seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(64) as pool:
        for number, answer in enumerate(pool.map(lambda n: engine.infer(batches[n % 24]), range(240))):
            np.testing.assert_array_equal(answer, expected(batches[number % 24]))
