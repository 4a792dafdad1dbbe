"""Sessions bound to buffers that stay: on the CPU provider, where all but the device's own memory is the same."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from trace_sdk.engines.binding import CAPTURED_BATCH, KEPT, BoundSession
from trace_sdk.engines.gpu_thread import GpuThread
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.onnx import OnnxEngine
from trace_sdk.errors import DeviceError, EngineError

MakeEngine = Callable[..., bytes]


def pictures(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture
def session(tiny_engine: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(tiny_engine, providers=["CPUExecutionProvider"])


def test_answers_are_those_of_a_plain_run_bit_for_bit(session: onnxruntime.InferenceSession) -> None:
    bound = BoundSession(session, np.float32)
    shapes = [(1, 16, 24), (3, 32, 16), (1, 24, 16), (1, 16, 24)]
    for seed, shape in enumerate(shapes * 3):
        batch = pictures(*shape, seed=seed)
        (plain,) = session.run(None, {"image": batch})
        np.testing.assert_array_equal(bound.run(batch), plain)
        turned = batch[:, ::-1, :, ::-1]  # not contiguous
        np.testing.assert_array_equal(bound.run(turned), session.run(None, {"image": turned.copy()})[0])
    assert bound.memory == "host" and bound.captured == 0


def test_buffers_stay_and_answers_do_not_share_them(session: onnxruntime.InferenceSession) -> None:
    bound = BoundSession(session, np.float32)
    first = bound.run(pictures(1, 16, 24))
    kept, addresses = first.copy(), {id(value) for value in bound._bound.values()}
    places = [buffers.device_edges.data_ptr() for buffers in bound._bound.values()]
    for seed in range(5):
        answer = bound.run(pictures(1, 16, 24, seed=seed + 1))
        assert not any(np.shares_memory(answer, buffers.edges) for buffers in bound._bound.values())
    assert {id(value) for value in bound._bound.values()} == addresses
    assert [buffers.device_edges.data_ptr() for buffers in bound._bound.values()] == places
    np.testing.assert_array_equal(first, kept)


def test_only_so_many_shapes_are_kept(session: onnxruntime.InferenceSession) -> None:
    bound = BoundSession(session, np.float32)
    for side in range(16, 16 + 8 * (KEPT + 3), 8):
        bound.run(pictures(1, side, 16))
        bound.run(pictures(1, 16, 16))  # the one that is used goes last
    assert len(bound._bound) == KEPT and (1, 16, 16, 3) in bound._bound and (1, 24, 16, 3) not in bound._bound


def test_each_known_shape_gets_a_graph_of_its_own(
    session: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU provider captures nothing; what onnxruntime is told is what it would be told on a GPU."""
    bound = BoundSession(session, np.float32, graphs=[(16, 24), (24, 16)])
    told: list[str] = []
    run = session.run_with_iobinding

    def watched(binding: Any, options: Any) -> None:
        told.append(options.get_run_config_entry("gpu_graph_id"))
        run(binding, options)

    monkeypatch.setattr(session, "run_with_iobinding", watched)
    for shape in [(1, 16, 24), (1, 24, 16), (2, 16, 24), (1, 16, 24), (1, 16, 16), (CAPTURED_BATCH + 1, 16, 24)]:
        bound.run(pictures(*shape))
    assert told == ["1", "2", "3", "1", "-1", "-1"], "0 is onnxruntime's own, -1 is no graph"
    assert bound.captured == 3
    for side in range(16, 16 + 8 * (KEPT + 3), 8):
        bound.run(pictures(1, 16, side + 16))
    assert {(1, 16, 24, 3), (1, 24, 16, 3), (2, 16, 24, 3)} <= set(bound._bound), "a graph's buffers are never freed"


def test_where_only_sessions_of_one_shape_capture_single_images_get_one(session: onnxruntime.InferenceSession) -> None:
    asked: list[tuple[int, int]] = []

    def fixed(shape: tuple[int, int]) -> onnxruntime.InferenceSession:
        asked.append(shape)
        return session

    bound = BoundSession(session, np.float32, graphs=[(16, 24), (24, 16)], fixed=fixed)
    for shape in [(1, 16, 24), (2, 16, 24), (1, 16, 24), (1, 16, 16)]:
        bound.run(pictures(*shape))
    assert asked == [(16, 24)] and bound.captured == 1


def test_a_run_that_fails_gives_its_number_and_buffers_back(
    session: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = BoundSession(session, np.float32, graphs=[(16, 24)])
    with monkeypatch.context() as patch:
        patch.setattr(session, "run_with_iobinding", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bound.run(pictures(1, 16, 24))
    assert not bound._bound and bound.captured == 0
    bound.run(pictures(1, 16, 24))
    assert bound.captured == 1 and bound._numbers == {(1, 16, 24, 3): 2}, "number 1 may have been captured half"


def test_pinned_memory_is_given_back_where_there_is_too_little_for_the_rest(
    session: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    class Memory:
        def use(self) -> None: ...

        def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
            array = np.zeros(shape, dtype)
            pinned.append(id(array))
            return array

        def unpin(self, array: NDArray[Any]) -> None:
            pinned.remove(id(array))

    def full(shape: tuple[int, int]) -> onnxruntime.InferenceSession:
        raise EngineError("out of memory")

    bound = BoundSession(session, np.float32, graphs=[(16, 24)], fixed=full)
    bound._gpu = Memory()  # type: ignore[assignment]
    with pytest.raises(EngineError):
        bound.run(pictures(1, 16, 24))
    assert not pinned and not bound._bound


def test_64_threads_get_the_serial_answers_from_one_gpu_thread(tiny_engine: Path) -> None:
    """The way of an engine on a GPU: whole batches, all in one thread."""
    engine = OnnxEngine(tiny_engine.read_bytes(), "tiny", "cpu")
    engine._gpu_thread = GpuThread("tiny")
    batches = [pictures(1 + seed % 3, 16 + 8 * (seed % 4), 24, seed=seed) for seed in range(32)]
    serial = [engine.infer(batch) for batch in batches]
    ran: set[int] = set()
    run = engine._bound.run
    engine._bound.run = lambda batch: (ran.add(threading.get_ident()), run(batch))[1]  # type: ignore[method-assign]
    with ThreadPoolExecutor(64) as pool:
        for number, answer in enumerate(pool.map(lambda n: engine.infer(batches[n % 32]), range(512))):
            np.testing.assert_array_equal(answer, serial[number % 32])
    assert len(ran) == 1


def test_a_gpu_thread_ends_with_its_engine() -> None:
    def alive() -> int:
        return sum(thread.name.startswith("trace-gpu") for thread in threading.enumerate())

    gc.collect()
    before = alive()
    thread = GpuThread("tiny")
    assert thread(lambda: 7) == 7 and alive() == before + 1
    with pytest.raises(KeyError):
        thread(lambda: {}["missing"])
    worker = next(iter(thread._pool._threads))
    del thread
    gc.collect()
    worker.join(5)
    assert not worker.is_alive()


def test_a_fork_is_told_that_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = GpuThread("tiny.onnx")
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(DeviceError, match=r"tiny.onnx: was opened before this process was forked.*spawn"):
        thread(lambda: 7)


def test_metadata_is_read_without_the_onnx_package(make_engine: MakeEngine) -> None:
    import onnx

    engine = make_engine()
    said = {entry.key: entry.value for entry in onnx.load_from_string(engine).metadata_props}
    assert read_metadata(engine, "tiny") == said and "trace_sdk" in said
    model = onnx.ModelProto(ir_version=2**40, model_version=-1, doc_string="ä" * 300)
    model.metadata_props.add(key="empty")
    assert read_metadata(model.SerializeToString(), "m") == {"empty": ""}
    for place in range(1, len(engine), 61):
        try:
            read_metadata(engine[:place], "cut")
        except EngineError:
            continue
    with pytest.raises(EngineError, match=r"cut.onnx: is not an ONNX model, or is cut short"):
        read_metadata(engine[:-1], "cut.onnx")
